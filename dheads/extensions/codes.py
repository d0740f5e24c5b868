"""Codes: numbers per frame that describe a part of the face, given to the network with the audio window.

A code is one class in a module of its own, and its line in CODES. The class says how the code is measured, what the
network keeps to normalise and predict it, and how it continues while a video is generated.
Off: no table of its name in extensions.codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from dheads.config import Config
from dheads.errors import DheadsError
from dheads.extensions.eyes import EyeCode
from dheads.extensions.lips import LipCode
from dheads.extensions.pose import PoseCode


class Track(Protocol):
    """A code while one video is generated."""

    reach: int
    """Frames of speech that it needs on either side of a frame, beyond its context."""

    def window(self, frame: int, speech: Tensor, at: int, context: int) -> Tensor:
        """The codes (2 context + 1, C) around a frame. speech (n, D): embeddings around it; row `at` is its own."""


class Code(Protocol):
    """One kind of code."""

    name: str
    """Of its table in the configuration, of its cue, and of what is fitted to data."""
    embedding: str
    """Name of its embedding among the weights."""
    dims: int
    """Numbers per frame."""
    usual: Sequence[float]
    """Size of each number as the network takes it, so that a new embedding sees numbers of about 1."""
    is_heard: bool
    """Whether it follows from the sound, so that it is absent where the sound is."""
    begins_at_zero: bool
    """Whether the embedding begins at zero, so that weights without the code can be trained on with it."""

    points: range
    """Landmarks (of 68) around which the code shows in the picture."""

    def measured(self, labels: Mapping[str, Tensor]) -> Tensor:
        """The code (F, C) of a prepared clip with those labels, before normalisation."""

    def events(self, code: Tensor) -> list[int]:
        """Frames of a code (F, C) that show something rare, such as a blink."""

    def fitted(self, config: Config) -> nn.Module | None:
        """What normalises and predicts the code, kept with the weights; None for a code that needs nothing."""

    def normalised(self, code: Tensor, fitted: nn.Module | None) -> Tensor:
        """The code (..., C) as measured -> as the network takes it."""

    def track(self, fitted: nn.Module | None, seed: int, event_rate: float) -> Track:
        """The code of one video. event_rate: events a second, for a code that changes by chance."""


CODES: dict[str, Code] = {code.name: code for code in (LipCode(), EyeCode(), PoseCode())}


def codes_of(config: Config) -> list[Code]:
    """The codes that a configuration turns on, in the order of CODES. Raises DheadsError for an unknown one."""
    for name in config.extensions.codes:
        if name not in CODES:
            raise DheadsError(
                f"configuration: unknown code extensions.codes.{name}; the known ones are {', '.join(CODES)}"
            )
    return [code for name, code in CODES.items() if name in config.extensions.codes]
