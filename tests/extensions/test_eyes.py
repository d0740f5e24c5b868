"""The eye code: how open the eyes are, and when they blink by chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dheads.config import FPS
from dheads.evaluation.measures import blink_seconds, blinks, blinks_per_second
from dheads.extensions.eyes import SHUT, Blinks, blinking, eye_code

SPEECH = torch.zeros(1, 4)  # does not matter


def drawn(seed: int, seconds: int, rate: float = 0.3) -> np.ndarray:
    """(F,): the code of every frame."""
    chance = Blinks(seed, rate)
    return torch.cat([chance.window(frame, SPEECH, 0, 0) for frame in range(seconds * FPS)])[:, 0].numpy()


def test_the_code_is_relative_to_the_persons_own_eyes() -> None:
    openness = torch.tensor([0.3, 0.3, 0.15, 0.06, 0.3, 0.33, 0.9])
    expected = torch.tensor([[0.0], [0.0], [-0.5], [-0.8], [0.0], [0.1], [0.5]])
    torch.testing.assert_close(eye_code(openness), expected)
    torch.testing.assert_close(eye_code(openness / 3), expected)


def test_blinks_come_as_often_and_last_as_long_as_peoples() -> None:
    """The paper's real clips: .24 to .53 a second, .28 to .40 s long."""
    openness = 1 + drawn(0, 600)
    assert blinks_per_second(openness) == pytest.approx(0.3, abs=0.05)
    assert 0.12 <= blink_seconds(openness) <= 0.4
    begins = np.array([first for first, _ in blinks(openness)])
    assert np.diff(begins).min() >= FPS, "never twice within a second"
    assert blinks_per_second(1 + drawn(0, 600, rate=0.6)) == pytest.approx(0.6, abs=0.08)
    assert (drawn(0, 60, rate=0.0) == 0).all()
    assert np.diff(begins).std() > FPS, "not like a clock"
    assert ((1 + drawn(0, 5)) <= 1).all()


def test_a_seed_blinks_at_the_same_times_and_windows_are_of_one_track() -> None:
    assert np.array_equal(drawn(3, 30), drawn(3, 30))
    assert not np.array_equal(drawn(3, 30), drawn(4, 30))
    chance, code = Blinks(3, 0.3), drawn(3, 30)
    assert (code < SHUT).any()
    for frame in (0, 1, 2, 100, 500):
        around = np.clip(np.arange(frame - 2, frame + 3), 0, None)
        assert np.array_equal(chance.window(frame, SPEECH, 0, 2)[:, 0].numpy(), code[around])


def test_open_eyes_do_not_blink_and_shut_ones_do() -> None:
    code = torch.tensor([0.5, 0.0, -0.05, -0.25, -0.45, -1.4])
    assert blinking(code).tolist() == pytest.approx([0, 0, 0, 0.5, 1, 1])
