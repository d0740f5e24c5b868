"""The eye code (beyond the paper): how far the eyes are open, and when somebody blinks.

What is said does not tell when eyes blink, so in training the network is told how far open they are, and in sampling
blinks come by chance.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dheads.conditioning import window
from dheads.config import FPS

SHUT = -0.25  # an eye code below this is part of a blink, as measures.blinks counts them
_PAUSE_SECONDS = 0.8  # the least from one blink to the next
# The eye code throughout a blink: the median of 605 in real clips (GRID, TalkVid, HDTF), over twice as deep.
# Networks close lids less than they are told.
_BLINK = (-0.05, -0.76, -1.4, -1.07, -0.51, -0.3, -0.2, -0.14)


def eye_code(openness: Tensor) -> Tensor:
    """The eyes' openness (F,), eye aspect ratios of one clip -> (F, 1): 0 as usual for this person, -1 shut."""
    return (openness / openness.median().clamp(min=1e-6) - 1).clamp(-1, 0.5)[:, None]


class Blinks:
    """The eye code of a video of any length, by chance; the same seed blinks at the same times."""

    def __init__(self, seed: int, rate: float) -> None:
        """rate: blinks a second."""
        self._rng = np.random.default_rng([seed, FPS])
        self._mean_wait = np.inf if rate == 0 else max(0.0, 1 / rate - _PAUSE_SECONDS - len(_BLINK) / FPS)
        self._code: list[float] = []

    def window(self, frame: int, context: int) -> Tensor:
        """The code of a frame and of those around it, (2 context + 1, 1)."""
        while len(self._code) <= frame + context:
            if self._mean_wait == np.inf:
                self._code += [0.0] * FPS
                continue
            wait = _PAUSE_SECONDS + self._rng.exponential(self._mean_wait)
            self._code += [0.0] * round(wait * FPS) + list(_BLINK)
        first = max(0, frame - context)
        return window(torch.tensor(self._code[first : frame + context + 1])[:, None], frame - first, context)
