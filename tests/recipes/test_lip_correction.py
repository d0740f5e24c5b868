"""Lip codes that are moved until mouths are open as told."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import program
from torch import Tensor

from dheads.conditioning import Cues
from dheads.config import preset
from dheads.extensions.lips import LipPredictor
from dheads.sampling.engine import Inputs

MEAN, STD = 0.1, 0.05


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return program("recipes/lip_correction.py")


@pytest.fixture
def predictor() -> LipPredictor:
    lips = LipPredictor(4)
    lips.mean.copy_(torch.tensor([MEAN, 0.0, 0.0]))
    lips.std.copy_(torch.tensor([STD, 0.02, 0.01]))
    return lips


@pytest.fixture
def correction(recipe: ModuleType, predictor: LipPredictor) -> Any:
    return recipe.LipCorrection(preset("small"), predictor, torch.tensor([1.0, 0.5, -0.25]))


def given(codes: list[float]) -> Inputs:
    """Inputs whose lips are open by these codes in all frames of the window."""
    lips = torch.zeros(len(codes), 5, 3)
    lips[..., 0] = torch.tensor(codes)[:, None]
    cues = Cues(torch.zeros(len(codes), 5, 4), {"lips": lips, "pose": torch.zeros(len(codes), 1, 6)})
    empty = torch.zeros(len(codes), 0)
    return Inputs(empty, empty, cues, None, empty)


def opening(inputs: Inputs) -> Tensor:
    return inputs.cues.codes["lips"][:, 2, 0] * STD + MEAN


def test_what_is_told_is_the_opening_of_the_code_in_the_middle_and_never_below_zero(correction: Any) -> None:
    inputs = given([0.0, 1.0, -3.0])
    inputs.cues.codes["lips"][:, [0, 1, 3, 4]] = 9.0
    torch.testing.assert_close(correction.told(inputs.cues), torch.tensor([0.1, 0.15, 0.0]))


def test_codes_move_along_the_direction_but_not_beyond_what_is_usual(correction: Any) -> None:
    inputs = given([0.0, 2.0, 3.0])
    moved = correction.moved(inputs, torch.tensor([1.0, 1.0, 1.0])).cues.codes["lips"]
    assert moved[:, 2].tolist() == [[1.0, 0.5, -0.25], [2.5, 0.5, -0.25], [3.0, 0.5, -0.25]]
    assert torch.equal(inputs.cues.codes["lips"][:, :, 0], torch.tensor([0.0, 2.0, 3.0])[:, None].expand(3, 5))


def test_mouths_that_open_by_half_and_gape_are_open_as_told(correction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(inputs: Inputs) -> Tensor:
        return 0.5 * (opening(inputs) - MEAN) + MEAN + 0.02

    monkeypatch.setattr(correction, "shown", lambda frames, cues: frames)
    inputs = given([-0.5, 0.0, 1.0])
    found = correction.inputs(inputs, drawn)
    torch.testing.assert_close(drawn(found), correction.told(inputs.cues), atol=1.5e-3, rtol=0)
    unreachable = given([2.0])
    assert opening(correction.inputs(unreachable, drawn)).item() == pytest.approx(2.5 * STD + MEAN)


def test_a_code_that_is_right_stays(correction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correction, "shown", lambda frames, cues: frames)
    inputs = given([-1.0, 0.5])
    torch.testing.assert_close(correction.inputs(inputs, opening).cues.codes["lips"], inputs.cues.codes["lips"])


def test_the_direction_is_how_codes_change_with_the_opening(recipe: ModuleType, predictor: LipPredictor) -> None:
    opened = torch.linspace(0, 0.2, 9)
    codes = torch.stack([opened, 0.3 + 0.2 * opened, 0.1 - 0.1 * opened], 1)
    clip = SimpleNamespace(moves=True)
    dataset = SimpleNamespace(split=lambda name: [clip, clip], labels=lambda clip: {"lips_code": codes})
    direction = recipe.opening_direction(dataset, predictor)
    torch.testing.assert_close(direction, torch.tensor([1.0, 0.2 * STD / 0.02, -0.1 * STD / 0.01]))
