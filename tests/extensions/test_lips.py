"""The lip code: normalised measures, and their prediction from speech."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dheads.conditioning import window
from dheads.extensions.lips import MEASURES, LipClip, LipPredictor, centred

SPEECH_DIM = 6
SCALE, SHIFT = torch.tensor([0.05, 0.02, 0.01]), torch.tensor([0.1, 0.0, 0.0])


@pytest.fixture(scope="module")
def relation() -> Tensor:
    """(6, 3), such that each measure has unit variance where speech has."""
    relation = torch.randn(6, 3, generator=torch.Generator().manual_seed(5))
    return relation / relation.norm(dim=0)


def talk(relation: Tensor, speaker: int, noise: float = 0.0, habit: float = 0.0, frames: int = 400) -> LipClip:
    """Measures of real sizes that follow the speech linearly, a frame late, with noise and a speaker's own mean."""
    generator = torch.Generator().manual_seed(speaker)
    speech = torch.randn(frames, 6, generator=generator)
    late = window(speech, torch.arange(frames) - 1, 0)[:, 0]  # (F, 6): the frame before
    measures = late @ relation + noise * torch.randn(frames, 3, generator=generator)
    return LipClip(f"speaker{speaker}", speech, SCALE * (measures + habit) + SHIFT)


def test_fit_recovers_a_linear_relation(relation: Tensor) -> None:
    lips = LipPredictor(SPEECH_DIM)
    fit = lips.fit([talk(relation, speaker) for speaker in range(6)])
    assert (fit > 0.98).all()
    new = talk(relation, 99)
    error = lips.predict(new.speech)[3:-3] - lips.normalise(new.measures)[3:-3]  # at the ends the windows repeat
    assert error.square().mean().sqrt() < 0.12
    # The weights are the relation's, at the frame before and nowhere else.
    weight = lips.weight.clone().unflatten(0, (7, 6))
    torch.testing.assert_close(weight[2], relation * SCALE / lips.std, rtol=0.1, atol=0.03)
    weight[2] = 0
    assert weight.abs().max() < 0.03


def test_predictions_vary_as_much_as_true_codes(relation: Tensor) -> None:
    """Ridge regression from noisy measures predicts too little; for speakers never seen, the gain mends that."""
    lips = LipPredictor(SPEECH_DIM)
    fit = lips.fit([talk(relation, speaker, noise=1.0) for speaker in range(10)])
    unseen = [talk(relation, speaker, noise=1.0) for speaker in range(50, 60)]
    predicted = torch.stack([lips.predict(one.speech).std(0) for one in unseen]).mean(0)
    torch.testing.assert_close(predicted, torch.ones(3), rtol=0, atol=0.06)
    mean = torch.cat([lips.predict(one.speech) for one in unseen]).mean(0)
    torch.testing.assert_close(mean, torch.zeros(3), rtol=0, atol=0.1)
    assert ((fit > 0.6) & (fit < 0.8)).all()  # sqrt(1/2) at best: half the variance is noise


def test_a_speakers_own_mean_is_not_heard(relation: Tensor) -> None:
    """Mouths that are wider throughout teach the same motion; the prediction has the average speaker's mean."""
    plain, habits = LipPredictor(SPEECH_DIM), LipPredictor(SPEECH_DIM)
    plain.fit([talk(relation, speaker) for speaker in range(4)])
    habits.fit([talk(relation, speaker, habit=speaker) for speaker in range(4)])
    torch.testing.assert_close(habits.weight * habits.std, plain.weight * plain.std, rtol=1e-3, atol=1e-5)
    new = talk(relation, 99, habit=1.5)
    said = habits.predict(new.speech) * habits.std + habits.mean
    torch.testing.assert_close(said.mean(0), new.measures.mean(0), rtol=0, atol=0.01)


def test_codes_of_the_training_clips_are_normal(relation: Tensor) -> None:
    lips = LipPredictor(SPEECH_DIM)
    clips = [talk(relation, speaker, 0.5) for speaker in (1, 2)]
    lips.fit(clips)
    codes = lips.normalise(torch.cat([clip.measures for clip in clips]))
    torch.testing.assert_close(codes.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(codes.std(0), torch.ones(3), rtol=1e-4, atol=1e-4)


def test_trials_are_spread_over_the_openings_that_are_heard(relation: Tensor) -> None:
    lips = LipPredictor(SPEECH_DIM)
    clips = [talk(relation, speaker, 0.5) for speaker in range(3)]
    lips.fit(clips)
    heard = torch.cat([lips.opening(clip.speech) for clip in clips])
    middle = torch.stack([lips.opening(trial)[5] for trial in lips.trials])
    shares = [(heard < opening).float().mean().item() for opening in middle]
    assert shares == pytest.approx(torch.linspace(0.03, 0.97, 6).tolist(), abs=0.01)
    rows = torch.cat([clip.speech for clip in clips])
    for trial in lips.trials:
        (place,) = (rows == trial[5]).all(1).nonzero()[0].tolist()
        assert torch.equal(rows[place - 5 : place + 6], trial)


def test_one_speaker_suffices(relation: Tensor) -> None:
    lips = LipPredictor(SPEECH_DIM)
    fit = lips.fit([talk(relation, 1)])
    assert (fit > 0.98).all()
    assert lips.predict(torch.randn(9, 6)).isfinite().all()


def test_a_new_predictor_changes_nothing() -> None:
    lips = LipPredictor(SPEECH_DIM)
    codes = torch.randn(4, 5, 3)
    assert torch.equal(lips.normalise(codes), codes)
    assert torch.equal(lips.predict(torch.randn(9, 6)), torch.zeros(9, 3))


def test_the_fit_travels_with_the_weights(relation: Tensor) -> None:
    lips, copy = LipPredictor(SPEECH_DIM), LipPredictor(SPEECH_DIM)
    clip = talk(relation, 1, 0.5, frames=100)
    lips.fit([clip])
    copy.load_state_dict(lips.state_dict())
    assert torch.equal(copy.predict(clip.speech), lips.predict(clip.speech))
    assert not list(lips.parameters()), "fitted, never trained"


def test_centred_keeps_the_opening_and_removes_the_persons_own_size() -> None:
    assert MEASURES == ("opening", "width", "thickness")
    measures = torch.tensor([[0.1, 0.9, 0.3], [0.2, 1.0, 0.5], [0.6, 1.3, 0.4]])
    wanted = torch.tensor([[0.1, -0.1, -0.1], [0.2, 0.0, 0.1], [0.6, 0.3, 0.0]])
    torch.testing.assert_close(centred(measures), wanted)
    torch.testing.assert_close(centred(measures + torch.tensor([0, 0.4, 0.2])), wanted)
    assert torch.equal(centred(measures[:1]), torch.tensor([[0.1, 0.0, 0.0]]))
