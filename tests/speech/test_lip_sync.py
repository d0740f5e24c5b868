"""Whether lips and sound are in step, of signals whose offset is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dheads.speech.sync import LipSync, Sync, correlation, lag

RNG = np.random.default_rng(0)
WAVES = [(RNG.uniform(0.02, 0.12), RNG.uniform(0, 2 * math.pi)) for _ in range(9)]  # of a mouth: 0.5 to 3 Hz


def smooth(frames: int, late: float = 0.0) -> np.ndarray:
    """A signal (F,) that is `late` frames late."""
    t = np.arange(frames) - late
    return np.sum([np.sin(2 * math.pi * frequency * t + phase) for frequency, phase in WAVES], axis=0)


# --- Signals


def test_correlation() -> None:
    signal = RNG.standard_normal(50)
    assert correlation(3 * signal + 2, signal) == pytest.approx(1)
    assert correlation(-signal, signal[:40]) == pytest.approx(-1)  # over the common frames
    assert correlation(np.array([1.0, 2, 3]), np.array([1.0, 3, 2])) == pytest.approx(0.5)
    lost = signal.copy()
    lost[7] = np.nan
    assert correlation(lost, signal) == pytest.approx(1)
    assert correlation(np.full(50, 0.3), signal) == 0  # a frozen mouth does not follow
    assert np.isnan(correlation(np.full(50, np.nan), signal))


@pytest.mark.parametrize("late", [-5, -2, -1.5, -0.3, 0, 0.4, 1, 3.7, 4])
def test_the_lag_is_found_between_frames(late: float) -> None:
    found = lag(smooth(100, late), smooth(100), 5)
    assert found.frames == pytest.approx(late, abs=0.05)
    assert found.correlation == pytest.approx(1, abs=0.02)


def test_the_lag_of_equal_signals_is_zero() -> None:
    assert lag(smooth(60), smooth(60), 5) == pytest.approx((0, 1), abs=1e-9)


def test_a_still_mouth_has_no_lag() -> None:
    assert lag(np.zeros(60), smooth(60), 5) == (0, 0)


def test_a_lag_beyond_the_reach_is_not_refined() -> None:
    assert lag(smooth(100, 5.6), smooth(100), 5).frames == 5


# --- Lips and sound


@pytest.fixture(scope="module")
def lips() -> LipSync:
    return LipSync()


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    """Embeddings (F, D) that change as smoothly as those of speech."""
    random = torch.randn(1, 384, 104, generator=torch.Generator().manual_seed(0))
    return 5 * torch.nn.functional.avg_pool1d(random, 5, 1)[0].T


def test_the_offset_is_how_late_the_picture_is(lips: LipSync, speech: torch.Tensor) -> None:
    heard = lips.heard(speech)
    for frames in (-4, 0, 3):
        found = lips(speech, np.roll(0.1 + 0.05 * heard, frames))
        assert found is not None
        assert found.offset_seconds == pytest.approx(frames / 25, abs=0.004)
        assert found.correlation == pytest.approx(1, abs=0.02)


def test_clips_that_are_too_short_or_silent_are_not_measured(lips: LipSync, speech: torch.Tensor) -> None:
    heard = lips.heard(speech)
    assert lips(speech[:69], heard[:69]) is None
    hidden = heard.copy()
    hidden[:31] = np.nan
    assert lips(speech, hidden) is None
    hidden[30] = 0
    assert lips(speech, hidden) is not None
    assert lips(0.01 * speech, heard) is None


def test_offsets_of_a_frame_are_within_the_measures_error() -> None:
    assert [Sync(late, 0.7).is_off for late in (-0.041, -0.03, 0.0, 0.03, 0.041)] == [True, False, False, False, True]
