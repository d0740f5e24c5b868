"""The lip code: normalised measures, and their prediction from speech."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dheads.conditioning import window
from dheads.config import ConditioningConfig
from dheads.lips import MEASURES, LipPredictor, centred

TOLD = ConditioningConfig(speech_dim=6, lip_dims=3)


def speaker(relation: Tensor, frames: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Speech, and measures that depend on it linearly, a frame late, with noise; of sizes as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    speech = torch.randn(frames, 6, generator=generator)
    late = window(speech, torch.arange(frames) - 1, 0)[:, 0]  # (F, 6): the frame before
    pure = late @ relation
    measures = pure + noise * pure.std(0) * torch.randn(frames, 3, generator=generator)
    return speech, torch.tensor([0.05, 0.02, 0.01]) * measures + torch.tensor([0.1, 0.0, 0.0])


@pytest.fixture(scope="module")
def relation() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(5))


def test_fit_recovers_a_linear_relation(relation: Tensor) -> None:
    lips = LipPredictor(TOLD)
    fit = lips.fit([speaker(relation, 400, 0.0, 1)], [speaker(relation, 300, 0.0, 2)])
    assert (fit > 0.999).all()
    speech, measures = speaker(relation, 200, 0.0, 3)
    error = lips.predict(speech)[3:-3] - lips.normalise(measures)[3:-3]  # at the ends the windows repeat
    assert error.abs().max() < 0.15
    # The weights are the relation's, at the frame before and nowhere else.
    weight = lips.weight.unflatten(0, (7, 6))
    scale = torch.tensor([0.05, 0.02, 0.01]) / lips.std
    torch.testing.assert_close(weight[2], relation * scale, rtol=0.1, atol=0.03)
    weight[2] = 0
    assert weight.abs().max() < 0.03


def test_predictions_have_the_spread_of_true_codes(relation: Tensor) -> None:
    """Ridge regression from noisy measures predicts too little; the gain brings it back to zero mean, unit variance."""
    lips = LipPredictor(TOLD)
    held_out = [speaker(relation, 300, 1.0, seed) for seed in (3, 4)]
    fit = lips.fit([speaker(relation, 300, 1.0, seed) for seed in (1, 2)], held_out)
    predicted = torch.cat([lips.predict(speech) for speech, _ in held_out])
    torch.testing.assert_close(predicted.std(0), torch.ones(3), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(predicted.mean(0), torch.zeros(3), rtol=0, atol=1e-3)
    assert ((fit > 0.55) & (fit < 0.85)).all()  # at most sqrt(1/2), as half the variance is noise


def test_codes_of_the_training_clips_are_normal(relation: Tensor) -> None:
    lips = LipPredictor(TOLD)
    clips = [speaker(relation, 200, 0.5, seed) for seed in (1, 2)]
    lips.fit(clips, clips)
    codes = lips.normalise(torch.cat([code for _, code in clips]))
    torch.testing.assert_close(codes.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(codes.std(0), torch.ones(3), rtol=1e-4, atol=1e-4)


def test_a_new_predictor_changes_nothing() -> None:
    lips = LipPredictor(TOLD)
    codes = torch.randn(4, 5, 3)
    assert torch.equal(lips.normalise(codes), codes)
    assert torch.equal(lips.predict(torch.randn(9, 6)), torch.zeros(9, 3))


def test_the_fit_travels_with_the_weights(relation: Tensor) -> None:
    lips, copy = LipPredictor(TOLD), LipPredictor(TOLD)
    clips = [speaker(relation, 100, 0.5, 1)]
    lips.fit(clips, clips)
    copy.load_state_dict(lips.state_dict())
    assert torch.equal(copy.predict(clips[0][0]), lips.predict(clips[0][0]))
    assert not list(lips.parameters()), "fitted, never trained"


def test_centred_keeps_the_opening_and_removes_the_persons_own_size() -> None:
    assert MEASURES == ("opening", "width", "thickness")
    measures = torch.tensor([[0.1, 0.9, 0.3], [0.2, 1.0, 0.5], [0.6, 1.3, 0.4]])
    wanted = torch.tensor([[0.1, -0.1, -0.1], [0.2, 0.0, 0.1], [0.6, 0.3, 0.0]])
    torch.testing.assert_close(centred(measures), wanted)
    torch.testing.assert_close(centred(measures + torch.tensor([0, 0.4, 0.2])), wanted)
    assert torch.equal(centred(measures[:1]), torch.tensor([[0.1, 0.0, 0.0]]))
