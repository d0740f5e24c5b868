"""Whether lips and sound are in step: the mouth's opening that is seen, against the one that is heard.

What is heard is what the lip code of the packaged weights predicts from the embeddings of the packaged speech encoder.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dheads.config import FPS
from dheads.weights.checkpoints import build_model, load

ENCODER = "whisper-tiny.en"  # whose embeddings the packaged lip code takes
_WEIGHTS = "small"
_REACH = 10  # frames, either way
_MIN_FRAMES = 70  # In shorter clips the best of 21 correlations is high by chance.
_MIN_SPREAD = 0.5  # of the opening heard, in standard deviations of speech; noise and silence have up to 0.25
# Three standard deviations of the measure's error, 13 ms: two halves of a clip in step differ by twice as much.
_TOLERANCE_SECONDS = 0.04


# ---- Signals (F,) ----


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two signals over their common frames; 0 if one of them is constant. NaN values are ignored."""
    count = min(len(a), len(b))
    both = np.isfinite(a[:count]) & np.isfinite(b[:count])
    if both.sum() < 2:
        return float("nan")
    a, b = a[:count][both] - a[:count][both].mean(), b[:count][both] - b[:count][both].mean()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm > 1e-9 else 0.0


class Lag(NamedTuple):
    """The shift at which two signals correlate best."""

    frames: float  # by which the first signal is late
    correlation: float  # there


def lag(a: np.ndarray, b: np.ndarray, reach: int) -> Lag:
    """The shift, at most `reach` frames either way, at which signal `a` correlates best with signal `b`.

    Refined between frames by the parabola through the best shift and its neighbours. Of equally good shifts, the
    smallest.
    """
    shifts = range(-reach, reach + 1)
    found = np.nan_to_num([correlation(a[max(k, 0) :], b[max(-k, 0) :]) for k in shifts], nan=-1.0)
    best = max(sorted(shifts, key=abs), key=lambda k: found[k + reach])
    if abs(best) == reach:
        return Lag(best, float(found[best + reach]))
    before, top, after = found[best + reach - 1 : best + reach + 2]
    # The parabola through (-1, before), (0, top), (1, after) has its vertex at (before - after) / 2 bend.
    bend = before - 2 * top + after
    vertex = (before - after) / (2 * bend) if bend < 0 else 0.0
    return Lag(float(best + vertex), float(top - (before - after) * vertex / 4))


# ---- Lips and sound ----


class Sync(NamedTuple):
    """By how much a picture is out of step with its sound."""

    offset_seconds: float  # by which the picture is late; below zero, the sound is
    correlation: float  # of the opening seen and the one heard, at that offset

    @property
    def is_off(self) -> bool:
        """Whether the offset is more than the measure's own error."""
        return abs(self.offset_seconds) > _TOLERANCE_SECONDS


def is_long_enough(opening: np.ndarray) -> bool:
    """Whether enough frames of an opening (F,), NaN without a face, are known to compare it with the sound."""
    return int(np.isfinite(opening).sum()) >= _MIN_FRAMES


class LipSync:
    """Measures by how much lips and sound are out of step."""

    def __init__(self) -> None:
        """Raises DheadsError where the packaged weights are damaged."""
        predictor = build_model(load(_WEIGHTS)).lip_predictor
        assert predictor is not None
        self._predictor = predictor

    def __call__(self, speech: Tensor, opening: np.ndarray) -> Sync | None:
        """The offset of embeddings (F, D) of ENCODER and the mouth's opening (F,) in eye distances, NaN without a face.

        None for a clip that is too short to say, or in which nobody speaks.
        """
        heard = self.heard(speech)
        if not is_long_enough(opening) or heard.std() < _MIN_SPREAD:
            return None
        late, r = lag(opening, heard, _REACH)
        return Sync(late / FPS, r)

    @torch.no_grad()
    def heard(self, speech: Tensor) -> np.ndarray:
        """Embeddings (F, D) -> the mouth's opening (F,) that they let expect, normalised."""
        opening: np.ndarray = self._predictor.predict(speech.float().cpu())[:, 0].numpy()
        return opening
