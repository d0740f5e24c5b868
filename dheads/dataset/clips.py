"""The clips of a training set: read from the disk, or all in the memory of a device.

Both return references to an example's pictures and labels (`pictures`, `window`), and turn many of these at once into
values (`gathered`): the references of a reader are the values, those of a resident set are rows in its tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dheads.conditioning import window
from dheads.dataset.dataset import Dataset, box_label, code_label
from dheads.dataset.manifest import Clip
from dheads.errors import DheadsError
from dheads.extensions.codes import CODES
from dheads.extensions.head_motion import FURTHEST
from dheads.system.prefetch import prefetch

PICTURES, SPEECH = "pictures", "speech"  # kinds of values; further ones are the names of codes


@dataclass(frozen=True, eq=False)
class Facts:
    """What the choice and the framing of an example depend on."""

    voices: int  # at how many tempos the speech was encoded
    mouth_box: Tensor  # (F, 4) px
    code_boxes: dict[str, Tensor]  # by code, (F, 4) px
    events: dict[str, list[int]]  # by code, the frames that show something rare
    framed: list[int]  # frames whose head is near the middle of the crop
    pose: Tensor  # (F, 6)
    landmarks: Tensor  # (F, 68, 2) px


class Clips(Protocol):
    """Pictures and labels of clips. What is asked of a clip that cannot be read raises DheadsError."""

    device: torch.device  # where the values are

    def facts(self, clip: Clip) -> Facts:
        """Of one clip."""

    def pictures(self, clip: Clip, indices: Sequence[int]) -> Tensor:
        """The pictures of those indices, (n, ...)."""

    def window(self, kind: str, clip: Clip, frames: Tensor, context: int, voice: int = 0) -> Tensor:
        """The labels around each of `frames` (n,), (n, 2 context + 1, ...). A photo has no sound: its speech is 0."""

    def gathered(self, kind: str, some: Tensor) -> Tensor:
        """The values of any number of these: pictures (..., H, W, 3) uint8, labels (..., D) float32."""


class ClipReader:
    """Reads on demand, and keeps what the dataset keeps."""

    device = torch.device("cpu")

    def __init__(self, dataset: Dataset, speech_dim: int) -> None:
        self._dataset, self._speech_dim = dataset, speech_dim

    def facts(self, clip: Clip) -> Facts:
        return _facts(clip, self._dataset.labels(clip), self._speech_dim)

    def pictures(self, clip: Clip, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._dataset.pictures(clip, indices))

    def window(self, kind: str, clip: Clip, frames: Tensor, context: int, voice: int = 0) -> Tensor:
        labels = self._dataset.labels(clip)
        label = SPEECH if kind == SPEECH else code_label(CODES[kind])
        values = labels["speech_at_tempos"][voice - 1] if voice else labels[label]
        if kind == SPEECH and not clip.moves:
            # No sound, as with extensions.sound.dropout: given silence, the network would learn that whoever falls
            # silent looks as in their photo.
            values = torch.zeros_like(values)
        return window(values, frames, context)

    def gathered(self, kind: str, some: Tensor) -> Tensor:
        return some


class ResidentClips:
    """Holds everything in tables on a device: a batch is a few look-ups in them.

    Clips that cannot be read are found when the tables are filled, and raise their error when they are asked for.
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
        self._first: dict[str, dict[str, int]] = {}  # each clip's first rows
        shape = (sum(clip.frames for clip in clips), dataset.size, dataset.size, 3)
        pictures = torch.empty(shape, dtype=torch.uint8, device=device)
        labels: dict[str, list[Tensor]] = {SPEECH: [torch.zeros(1, speech_dim)], **{name: [] for name in CODES}}
        row, speech_row = 0, 1  # row 0 of the speech is the photos'
        read = prefetch(_whole, ((dataset, clip, speech_dim) for clip in clips), threads)
        bar = tqdm(clips, desc="load", unit="clip", disable=not progress)
        for clip, whole in zip(bar, read, strict=True):
            if isinstance(whole, DheadsError):
                self._broken[clip.clip] = whole
                continue
            self._facts[clip.clip] = whole.facts
            if isinstance(whole.pictures, DheadsError):
                self._broken[clip.clip] = whole.pictures
                continue
            label = whole.labels
            pictures[row : row + clip.frames].copy_(whole.pictures)
            voices = torch.cat([label["speech"][None], label["speech_at_tempos"]]).flatten(0, 1)
            labels[SPEECH].append(voices)
            for name, code in CODES.items():
                labels[name].append(label[code_label(code)])
            self._first[clip.clip] = {PICTURES: row, SPEECH: speech_row, **dict.fromkeys(CODES, row)}
            row, speech_row = row + clip.frames, speech_row + len(voices)
        self._tables: dict[str, Tensor] = {PICTURES: pictures}
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
        return torch.tensor(indices) + self._first[clip.clip][PICTURES]

    def window(self, kind: str, clip: Clip, frames: Tensor, context: int, voice: int = 0) -> Tensor:
        if kind == SPEECH and not clip.moves:
            return window(self._rows[:1], frames, context)
        first = self._first[clip.clip][kind] + voice * clip.frames
        return window(self._rows[first : first + clip.frames], frames, context)

    def gathered(self, kind: str, some: Tensor) -> Tensor:
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
        1 + len(labels["speech_at_tempos"]),
        labels["mouth_box"],
        {name: labels[box_label(code)] for name, code in CODES.items()},
        {name: code.events(labels[code_label(code)]) for name, code in CODES.items()},
        _framed(labels["pose"]),
        labels["pose"],
        labels["landmarks"],
    )


def _framed(pose: Tensor) -> list[int]:
    """The frames of poses (F, 6) with the head near the middle of the crop; all where there are fewer than two."""
    near = (pose[:, :4].abs() <= FURTHEST).all(1).nonzero()[:, 0].tolist()
    return near if len(near) > 1 else list(range(len(pose)))


@dataclass(frozen=True, eq=False)
class _Whole:
    """A clip as read."""

    facts: Facts
    labels: dict[str, Tensor]
    pictures: Tensor | DheadsError  # (F, H, W, 3) uint8, or why they cannot be read


def _whole(dataset: Dataset, clip: Clip, speech_dim: int) -> _Whole | DheadsError:
    """A clip, or why not even its labels can be read."""
    try:
        labels = dataset.labels(clip)
        facts = _facts(clip, labels, speech_dim)
    except DheadsError as error:
        return error
    try:
        return _Whole(facts, labels, torch.from_numpy(dataset.read(clip, range(clip.frames))))
    except DheadsError as error:
        return _Whole(facts, labels, error)
