"""The clips of a training set as batches are made of them: read from the disk, or all in the memory of a device.

Both say of an example's pictures and labels which they are (`pictures`, `window`), and turn many of these at once into
their values (`gathered`): what a reader says is the values, what a resident set says is their rows in its tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dheads.conditioning import window
from dheads.dataset.dataset import Clip, Dataset
from dheads.errors import DheadsError
from dheads.extensions.blinks import SHUT
from dheads.system.prefetch import prefetch

Kind = Literal["pictures", "speech", "lips", "eyes"]
_LABELS = {"speech": "speech", "lips": "centred_lips", "eyes": "eye_code"}


@dataclass(frozen=True, eq=False)
class Facts:
    """What the choice of an example depends on."""

    shut: list[int]  # frames with closed eyes
    voices: int  # at how many tempos the speech was encoded
    mouth_box: Tensor  # (F, 4) px
    eye_box: Tensor  # (F, 4) px


class Clips(Protocol):
    """Pictures and labels of clips. What is asked of a clip that cannot be read raises DheadsError."""

    device: torch.device  # where the values are

    def facts(self, clip: Clip) -> Facts:
        """Of one clip."""

    def pictures(self, clip: Clip, indices: Sequence[int]) -> Tensor:
        """The pictures of those indices, (n, ...)."""

    def window(self, kind: Kind, clip: Clip, frames: Tensor, context: int, voice: int = 0) -> Tensor:
        """The labels around each of `frames` (n,), (n, 2 context + 1, ...). A photo has no sound: its speech is 0."""

    def gathered(self, kind: Kind, some: Tensor) -> Tensor:
        """The values of any number of these: pictures (..., H, W, 3) uint8, labels (..., D) float32."""


class ClipReader:
    """Reads what is asked for, and keeps what the dataset keeps."""

    device = torch.device("cpu")

    def __init__(self, dataset: Dataset, speech_dim: int) -> None:
        self._dataset, self._speech_dim = dataset, speech_dim

    def facts(self, clip: Clip) -> Facts:
        return _facts(clip, self._dataset.labels(clip), self._speech_dim)

    def pictures(self, clip: Clip, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._dataset.pictures(clip, indices))

    def window(self, kind: Kind, clip: Clip, frames: Tensor, context: int, voice: int = 0) -> Tensor:
        labels = self._dataset.labels(clip)
        values = labels["speech_at_tempos"][voice - 1] if voice else labels[_LABELS[kind]]
        if kind == "speech" and clip.frames == 1:
            # As where training.audio_dropout takes it away: told silence, the network would learn that whoever falls
            # silent looks as in their photo.
            values = torch.zeros_like(values)
        return window(values, frames, context)

    def gathered(self, kind: Kind, some: Tensor) -> Tensor:
        return some


class ResidentClips:
    """Holds everything in tables on a device: a batch is a few look-ups in them.

    Clips that cannot be read are found out at the beginning, and told when they are asked for.
    """

    def __init__(
        self,
        dataset: Dataset,
        clips: Sequence[Clip],
        speech_dim: int,
        device: torch.device,
        *,
        threads: int = 1,
        progress: bool = False,
    ) -> None:
        self.device = device
        self._facts: dict[str, Facts] = {}
        self._broken: dict[str, DheadsError] = {}
        self._first: dict[str, dict[Kind, int]] = {}  # each clip's first rows
        shape = (sum(clip.frames for clip in clips), dataset.size, dataset.size, 3)
        pictures = torch.empty(shape, dtype=torch.uint8, device=device)
        labels: dict[Kind, list[Tensor]] = {"speech": [torch.zeros(1, speech_dim)], "lips": [], "eyes": []}
        row, speech_row = 0, 1  # row 0 of the speech is the photos'
        read = prefetch(_whole, ((dataset, clip, speech_dim) for clip in clips), threads)
        bar = tqdm(clips, desc="load", unit="clip", disable=not progress)
        for clip, whole in zip(bar, read, strict=True):
            if whole.facts is not None:
                self._facts[clip.clip] = whole.facts
            if whole.error is not None:
                self._broken[clip.clip] = whole.error
                continue
            label = whole.labels
            pictures[row : row + clip.frames].copy_(whole.pictures)
            voices = torch.cat([label["speech"][None], label["speech_at_tempos"]]).flatten(0, 1)
            for kind, values in ("speech", voices), ("lips", label["centred_lips"]), ("eyes", label["eye_code"]):
                labels[kind].append(values)
            self._first[clip.clip] = {"pictures": row, "speech": speech_row, "lips": row, "eyes": row}
            row, speech_row = row + clip.frames, speech_row + len(voices)
        self._tables: dict[Kind, Tensor] = {"pictures": pictures}
        self._tables |= {kind: torch.cat(values).to(device) for kind, values in labels.items()}
        self._rows = torch.arange(max(row, speech_row))

    def facts(self, clip: Clip) -> Facts:
        # As read from the disk: a clip whose pictures are damaged has its facts.
        if clip.clip not in self._facts:
            raise self._broken[clip.clip]
        return self._facts[clip.clip]

    def pictures(self, clip: Clip, indices: Sequence[int]) -> Tensor:
        if clip.clip in self._broken:
            raise self._broken[clip.clip]
        return torch.tensor(indices) + self._first[clip.clip]["pictures"]

    def window(self, kind: Kind, clip: Clip, frames: Tensor, context: int, voice: int = 0) -> Tensor:
        if kind == "speech" and clip.frames == 1:
            return window(self._rows[:1], frames, context)
        first = self._first[clip.clip][kind] + voice * clip.frames
        return window(self._rows[first : first + clip.frames], frames, context)

    def gathered(self, kind: Kind, some: Tensor) -> Tensor:
        return self._tables[kind][some.to(self.device)]


def fits(dataset: Dataset, clips: Sequence[Clip], device: torch.device) -> bool:
    """Whether all pictures and labels of the clips may lie in the device's memory: in half of what is free there."""
    if device.type != "cuda":
        return False
    return dataset.bytes_of(clips) <= torch.cuda.mem_get_info(device)[0] // 2


def _facts(clip: Clip, labels: dict[str, Tensor], speech_dim: int) -> Facts:
    if (own := labels["speech"].shape[1]) != speech_dim:
        raise DheadsError(
            f"{clip.clip}: has {own} values of speech a frame instead of {speech_dim}; prepare the data again"
        )
    return Facts(
        (labels["eye_code"][:, 0] < SHUT).nonzero()[:, 0].tolist(),
        1 + len(labels["speech_at_tempos"]),
        labels["mouth_box"],
        labels["eye_box"],
    )


@dataclass(frozen=True, eq=False)
class _Whole:
    """A clip as read; what could not be read is None, because of `error`."""

    facts: Facts | None
    labels: dict[str, Tensor] | None = None
    pictures: Tensor | None = None  # (F, H, W, 3) uint8
    error: DheadsError | None = None


def _whole(dataset: Dataset, clip: Clip, speech_dim: int) -> _Whole:
    facts = None
    try:
        labels = dataset.labels(clip)
        facts = _facts(clip, labels, speech_dim)
        return _Whole(facts, labels, torch.from_numpy(dataset.read(clip, range(clip.frames))))
    except DheadsError as error:
        return _Whole(facts, error=error)
