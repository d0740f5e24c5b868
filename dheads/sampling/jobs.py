"""Jobs of `dheads sample`, one per video: read from a CSV file, or made from several sounds."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dheads.config import AudioCodec, SamplingConfig
from dheads.errors import DheadsError
from dheads.system.files import as_path, is_endless

if TYPE_CHECKING:
    import numpy as np

SIZES = 16, 8192  # smallest and largest side of a video, px
MAX_SQUARE = 4096  # largest side of a square video, px
MAX_GUIDANCE = 20
MAX_MOTION = 2
MAX_AT_SECONDS = 86_400
MAX_SEED = 2**63 - 1
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: pathlib merges the two
SOLVERS = typing.get_args(typing.get_type_hints(SamplingConfig)["solver"])


@dataclass(frozen=True)
class Job:
    """One video to generate: its inputs, its output and its settings. None: as the weights recommend.

    Paths are also accepted as strings.
    """

    face: Path | np.ndarray
    """Photo or video, or a picture (H, W, 3) uint8 RGB."""
    audio: Path | BinaryIO
    """Sound or video file, or a stream of one."""
    output: Path | BinaryIO
    """Video file, or a stream that takes the video in fragments."""
    seed: int = 0
    """Seed of the sampling noise."""
    size: int | None = None
    """Side of the video, px, with `paste` the longest; None: the face's own in its picture, or the picture's own."""
    steps: int | None = None
    """Denoising steps per frame."""
    solver: str | None = None
    """Sampling algorithm, one of SOLVERS."""
    weights: str = "small"
    """Name in weights.toml, or path of a checkpoint."""
    guidance: float | None = None
    """Scale of classifier-free guidance by the sound; 1: off."""
    at: float | None = None
    """Time of the frame to use, seconds, where `face` is a video; None: its first frame with a face."""
    which: int | None = None
    """Which of several faces, counted from the largest, 1; None: the largest."""
    paste: bool = False
    """Whether the face is pasted back into the whole picture."""
    still: bool = False
    """Whether the head stays where it is in the photo."""
    motion: float | None = None
    """How far the head moves, as a multiple of what people do; None: 1."""
    motion_from: Path | None = None
    """Video whose head motion and blinks are repeated; None: both come by chance."""
    audio_codec: AudioCodec = "aac"
    """Sound of the video: AAC, or a copy where MP4 can hold it."""
    fault: str | None = None
    """Why a row of a CSV file is not a valid job; None for a valid one."""

    def __post_init__(self) -> None:
        for name in ("face", "audio", "output"):
            object.__setattr__(self, name, as_path(getattr(self, name)))

    @property
    def output_path(self) -> Path:
        """`output` of a job of a list, which is always a file."""
        assert isinstance(self.output, Path), "only a single job writes to a stream"
        return self.output


def read_jobs(source: Path | str | BinaryIO, defaults: Job) -> list[Job]:
    """A job per row of a CSV file with the columns face, audio, output, and any of the other `COLUMNS`, in any order.

    An empty field takes its value from `defaults`. An invalid row becomes a job with a `fault`.
    Raises DheadsError for a file that cannot be read, a header with other columns, and a file without rows.
    """
    source = as_path(source)
    name = str(source) if isinstance(source, Path) else "the list from stdin"
    try:
        data = source.read_bytes() if isinstance(source, Path) else source.read()
        rows = list(_rows(io.StringIO(data.decode("utf-8-sig"), newline="")))
    except OSError as error:
        raise DheadsError(f"cannot read {name}: {error.strerror}; name a CSV file of jobs") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DheadsError(f"{name} is not a CSV file in UTF-8 ({error}); export it again") from error
    header = [column.strip() for column in rows[0][1]] if rows else []
    if not set(_REQUIRED) <= set(header) <= set(COLUMNS) or len(set(header)) < len(header):
        raise DheadsError(
            f"{name}: the first line must name the columns {', '.join(_REQUIRED)} and may name "
            f"{', '.join(c for c in COLUMNS if c not in _REQUIRED)}, but it is {','.join(header)[:200]!r}"
        )
    if len(rows) == 1:
        raise DheadsError(f"{name} has no jobs; write one per line after the first")
    return [_job(f"{name}:{line}", header, row, defaults) for line, row in rows[1:]]


def jobs_of_sounds(defaults: Job, sounds: Iterable[Path | str], folder: Path | str) -> list[Job]:
    """A job per sound, with its output in `folder` and named after the sound."""
    paths = [Path(sound) for sound in sounds]
    return [replace(defaults, audio=path, output=Path(folder) / f"{path.stem}.mp4") for path in paths]


def takes_of(jobs: Iterable[Job], takes: int) -> list[Job]:
    """Each job repeated with seeds seed, seed + 1 ... and outputs NAME-1.mp4, NAME-2.mp4 ..."""
    return [
        replace(job, seed=(job.seed + k) % (MAX_SEED + 1), output=_numbered(job.output_path, k + 1))
        for job in jobs
        for k in range(takes)
    ]


def check_distinct(jobs: Iterable[Job]) -> None:
    """Raises DheadsError where two jobs would write the same file."""
    seen: dict[str, Job] = {}
    for job in jobs:
        other = seen.setdefault(os.path.normcase(os.path.realpath(job.output_path)), job)
        if other is not job and job.fault is None and other.fault is None:
            raise DheadsError(
                f"{job.output} would be written twice, with the sound of {other.audio} and of {job.audio}; give each "
                "job its own output"
            )


def check_inputs(job: Job) -> None:
    """Raises DheadsError, with what to do instead, for settings beyond their limits or that exclude each other, and
    for a face or sound that is -, a URL, a pipe or a device."""
    for name in _LIMITED:
        if (value := getattr(job, name)) is not None:
            try:
                COLUMNS[name](str(value))
            except ValueError as error:
                raise DheadsError(f"{name}={value!r} must be {error}") from None
    if conflict := _conflict(job):
        raise DheadsError(f"the video {conflict}")
    if isinstance(job.face, Path) and job.face == Path("-"):
        raise DheadsError("FACE is -, but only sound is read from stdin; save the picture to a file and give that")
    for source, what in ((job.face, "picture"), (job.audio, "sound"), (job.motion_from, "video")):
        if not isinstance(source, Path):
            continue
        if _URL.match(str(source)) and not os.path.exists(source):
            address = source.as_posix().replace(":/", "://", 1)
            raise DheadsError(f"{address} is an address; download the {what} to a file and give that")
        if is_endless(source):
            piped = " (or, for a single video, pipe it in and give - as AUDIO)" if what == "sound" else ""
            raise DheadsError(f"{source} is a pipe or a device; save the {what} to a file and give that{piped}")


def _conflict(job: Job) -> str | None:
    """Which settings of the job exclude each other."""
    if not job.paste and job.size is not None and job.size > MAX_SQUARE:
        return f"has size={job.size}, but only with paste may it be more than {MAX_SQUARE} px"
    if job.still and (job.motion is not None or job.motion_from is not None):
        return "has still and a motion, but a still head does not move; leave one of them out"
    return None


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


# --- Rows of a CSV file ----------------------------------------------------------------------------------------------


def _rows(text: io.StringIO) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields) of every row that is not empty."""
    reader = csv.reader(text, strict=True)
    for row in reader:
        if any(field.strip() for field in row):
            yield reader.line_num, row


def _job(row_name: str, header: list[str], row: list[str], defaults: Job) -> Job:
    texts = {column: text.strip() for column, text in zip(header, row, strict=False) if text.strip()}
    output = Path(texts.get("output", row_name))
    try:
        if len(row) != len(header):
            raise ValueError(f"has {len(row)} fields where the first line has {len(header)}")
        if missing := [column for column in _REQUIRED if column not in texts]:
            raise ValueError(f"has no {missing[0]}")
        job = replace(defaults, **{column: _value(column, text) for column, text in texts.items()})
        if conflict := _conflict(job):
            raise ValueError(conflict)
        return job
    except ValueError as error:
        return replace(defaults, output=output, fault=f"{row_name} {error}")


def _value(column: str, text: str) -> Any:
    """The field's value, of the type that `Job` has for the column. Raises ValueError."""
    try:
        return COLUMNS[column](text)
    except ValueError as error:
        raise ValueError(f"has {column}={text[:100]!r}, which must be {error}") from None


# --- Parsers of fields: each raises ValueError, which describes the valid values -------------------------------------


def _path(text: str) -> Path:
    if text == "-" or "\0" in text:
        raise ValueError("the path of a file")
    return Path(text)


def _whole(minimum: int, maximum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and minimum <= int(text) <= maximum):
            raise ValueError(f"a whole number from {minimum} to {maximum}")
        return int(text)

    return parse


def _real(minimum: float, maximum: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not minimum <= value <= maximum:
            raise ValueError(f"a number from {minimum:g} to {maximum:g}")
        return value

    return parse


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError("yes or no")
    return text == "yes"


def _one_of(*values: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in values:
            raise ValueError(f"one of {', '.join(values)}")
        return text

    return parse


_REQUIRED = "face", "audio", "output"
_LIMITED = "seed", "size", "steps", "solver", "guidance", "at", "which", "motion"
COLUMNS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(_REQUIRED, _path),
    "seed": _whole(0, MAX_SEED),
    "size": _whole(*SIZES),
    "steps": _whole(1, 100_000),
    "solver": _one_of(*SOLVERS),
    "weights": str,
    "guidance": _real(0, MAX_GUIDANCE),
    "at": _real(0, MAX_AT_SECONDS),
    "which": _whole(1, 1_000),
    "paste": _yes_or_no,
    "still": _yes_or_no,
    "motion": _real(0, MAX_MOTION),
    "motion_from": _path,
    "audio_codec": _one_of(*typing.get_args(AudioCodec)),
}
