"""Pairs of a generated and a real video, as files and as footage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dheads.errors import DheadsError
from dheads.evaluation.footage import Footage
from dheads.media.reading import VIDEOS

Failures = list[tuple[str, str]]  # (clip, reason)


class VideoPair(NamedTuple):
    """The files of one clip."""

    clip: str  # the path below its folder, without the suffix
    generated: Path
    reference: Path
    raw: Path | None = None  # what the reference is cut from, if alignment takes the head's motion away


@dataclass(frozen=True)
class FootagePair:
    """A generated and a real video of the same number of frames."""

    files: VideoPair
    generated: Footage
    reference: Footage

    def sides(self) -> Iterator[tuple[str, Footage, Path]]:
        """(prefix of its measures, footage, file) of the generated video, then of the real one."""
        yield "", self.generated, self.files.generated
        yield "true_", self.reference, self.files.reference


def find_pairs(generated: Path, reference: Path) -> tuple[list[VideoPair], Failures]:
    """Pair two videos, or the videos of the same name in two folders; generated videos without a real one are failures.

    Raises DheadsError where there is no pair.
    """
    if generated.is_file() and reference.is_file():
        return [VideoPair(generated.stem, generated, reference)], []
    made, real = _videos(generated), _videos(reference)
    pairs = [VideoPair(clip, path, real[clip]) for clip, path in made.items() if clip in real]
    if not pairs:
        raise DheadsError(f"{generated}: none of its {len(made)} videos has the name of one in {reference}")
    return pairs, [(clip, f"no video of that name in {reference}") for clip in made if clip not in real]


def _videos(folder: Path) -> dict[str, Path]:
    """The videos below a folder, sorted by path; the keys are relative paths without the suffix."""
    if not folder.is_dir():
        raise DheadsError(f"{folder}: is no folder; give two folders of videos, or two videos")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS and path.is_file())
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
