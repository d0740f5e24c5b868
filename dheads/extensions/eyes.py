"""The eye code: how far the eyes are open, and when somebody blinks.

Speech does not tell when eyes blink, so in training the network is given how far open they are, and in sampling blinks
come by chance.
Why: lids that closed by 5 % of what real ones do close by 63 to 87 %. Off: no table extensions.codes.eyes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dheads.conditioning import window
from dheads.config import FPS, Config

SHUT = -0.25  # an eye code below this is part of a blink, as measures.blinks counts them
_PAUSE_SECONDS = 0.8  # the least from one blink to the next
# The eye code throughout a blink: the median of 605 in real clips (GRID, TalkVid, HDTF), over twice as deep.
# Networks close lids less than the code asks for.
_BLINK = (-0.05, -0.76, -1.4, -1.07, -0.51, -0.3, -0.2, -0.14)


def eye_code(openness: Tensor) -> Tensor:
    """The eyes' openness (F,), eye aspect ratios of one clip -> (F, 1): 0 as usual for this person, -1 shut."""
    return (openness / openness.median().clamp(min=1e-6) - 1).clamp(-1, 0.5)[:, None]


def blinking(code: Tensor) -> Tensor:
    """How far eyes of that code (...) are in a blink, 0 .. 1: from 0 where they are open as usual."""
    return ((-0.05 - code) / 0.4).clamp(0, 1)


class Blinks:
    """The eye code of a video of any length, by chance; the same seed blinks at the same times."""

    reach = 0

    def __init__(self, seed: int, rate: float) -> None:
        """rate: blinks a second."""
        self._rng = np.random.default_rng([seed, FPS])
        self._mean_wait = np.inf if rate == 0 else max(0.0, 1 / rate - _PAUSE_SECONDS - len(_BLINK) / FPS)
        self._code: list[float] = []

    def window(self, frame: int, speech: Tensor, at: int, context: int) -> Tensor:
        """The code of a frame and of those around it, (2 context + 1, 1); the speech does not matter."""
        while len(self._code) <= frame + context:
            if self._mean_wait == np.inf:
                self._code += [0.0] * FPS
                continue
            wait = _PAUSE_SECONDS + self._rng.exponential(self._mean_wait)
            self._code += [0.0] * round(wait * FPS) + list(_BLINK)
        first = max(0, frame - context)
        return window(torch.tensor(self._code[first : frame + context + 1])[:, None], frame - first, context)


class EyeCode:
    """See the module's docstring."""

    name, embedding, dims = "eyes", "eye_embed", 1
    usual: Sequence[float] = (1.0,)
    is_heard, begins_at_zero = False, True
    points = range(36, 48)  # landmarks of both eyes

    def measured(self, labels: Mapping[str, Tensor]) -> Tensor:
        return eye_code(labels["eyes"])

    def events(self, code: Tensor) -> list[int]:
        """Frames of a blink."""
        return [int(frame) for frame in (code[:, 0] < SHUT).nonzero()[:, 0]]

    def fitted(self, config: Config) -> None:
        return None

    def normalised(self, code: Tensor, fitted: nn.Module | None) -> Tensor:
        return code

    def track(self, fitted: nn.Module | None, seed: int, event_rate: float) -> Blinks:
        return Blinks(seed, event_rate)
