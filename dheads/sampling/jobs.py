"""What `dheads sample` is to make: a job is one video. Lists of them from a CSV file or from many sounds."""

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
from typing import Any, BinaryIO

from dheads.config import AudioCodec, SamplingConfig
from dheads.errors import DheadsError
from dheads.system.files import as_path, is_endless

SIZES = 16, 4096  # px; of a video's side
MOST_GUIDANCE = 20
LAST_SECOND = 86_400  # of a video as face
LARGEST_SEED = 2**63 - 1
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # of the web; as a path it has one slash
SOLVERS = typing.get_args(typing.get_type_hints(SamplingConfig)["solver"])


@dataclass(frozen=True)
class Job:
    """One video: whose face says what, where it is written, and how it is made. None: as the weights have it.

    Paths may be given as text.
    """

    face: Path
    audio: Path | BinaryIO
    output: Path | BinaryIO
    seed: int = 0
    size: int | None = None  # px
    steps: int | None = None
    solver: str | None = None
    weights: str = "small"
    guidance: float | None = None
    at: float | None = None  # seconds into a video as face; None: its first frame with a face
    which: int | None = None  # of several faces, from the largest: 1; None: the largest
    paste: bool = False  # the face goes back into its picture
    still: bool = False  # the head keeps to its place in the photo
    audio_codec: AudioCodec = "aac"  # of the video's sound; copy: as it is, where MP4 can hold it
    fault: str | None = None  # why a row of a list is no job

    def __post_init__(self) -> None:
        for name in ("face", "audio", "output"):
            object.__setattr__(self, name, as_path(getattr(self, name)))


def read_jobs(source: Path | str | BinaryIO, defaults: Job) -> list[Job]:
    """The rows of a CSV file with the columns face, audio and output, and any others of a `Job`'s options, in any
    order. What a row leaves empty is as in `defaults`. A row that cannot be used has a `fault`.

    Raises DheadsError for a file that cannot be read, another header, and no rows.
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
    if not set(_NEEDED) <= set(header) <= set(_COLUMNS) or len(set(header)) < len(header):
        raise DheadsError(
            f"{name}: the first line must name the columns {', '.join(_NEEDED)} and may name "
            f"{', '.join(c for c in _COLUMNS if c not in _NEEDED)}, but it is {','.join(header)[:200]!r}"
        )
    if len(rows) == 1:
        raise DheadsError(f"{name} names no job; write one in each line after the first")
    return [_job(f"{name}:{line}", header, row, defaults) for line, row in rows[1:]]


def jobs_of_sounds(defaults: Job, sounds: Iterable[Path | str], folder: Path | str) -> list[Job]:
    """A video of each sound in `folder`, named after it."""
    return [replace(defaults, audio=sound, output=Path(folder) / f"{Path(sound).stem}.mp4") for sound in sounds]


def takes_of(jobs: Iterable[Job], takes: int) -> list[Job]:
    """Each job that often, with seeds that follow each other, as NAME-1.mp4, NAME-2.mp4 and so on."""
    return [
        replace(job, seed=(job.seed + k) % (LARGEST_SEED + 1), output=_numbered(job.output, k + 1))
        for job in jobs
        for k in range(takes)
    ]


def check_distinct(jobs: Iterable[Job]) -> None:
    """Raises DheadsError where two jobs would write the same file."""
    seen: dict[str, Job] = {}
    for job in jobs:
        other = seen.setdefault(os.path.normcase(os.path.realpath(job.output)), job)
        if other is not job and job.fault is None and other.fault is None:
            raise DheadsError(
                f"{job.output} would be written twice, with the sound of {other.audio} and of {job.audio}; give each "
                "job an output of its own"
            )


def check_inputs(job: Job) -> None:
    """Raises DheadsError, which shows the way out, for a face or sound that is named, but cannot be a file."""
    if job.face == Path("-"):
        raise DheadsError("FACE is -, but only sound is read from stdin; save the picture to a file and give that")
    for source, what in ((job.face, "picture"), (job.audio, "sound")):
        if not isinstance(source, Path):
            continue
        if _ADDRESS.match(str(source)) and not os.path.exists(source):
            address = source.as_posix().replace(":/", "://", 1)
            raise DheadsError(f"{address} is an address; download the {what} to a file and give that")
        if is_endless(source):
            piped = " (or, for a single video, pipe it in and give - as AUDIO)" if what == "sound" else ""
            raise DheadsError(f"{source} is a pipe or a device; save the {what} to a file and give that{piped}")


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


# --- Rows of a CSV file ----------------------------------------------------------------------------------------------


def _rows(text: io.StringIO) -> Iterator[tuple[int, list[str]]]:
    """(number of its line, fields) of every row that is not empty."""
    reader = csv.reader(text, strict=True)
    for row in reader:
        if any(field.strip() for field in row):
            yield reader.line_num, row


def _job(name: str, header: list[str], row: list[str], defaults: Job) -> Job:
    given = {column: text.strip() for column, text in zip(header, row, strict=False) if text.strip()}
    output = Path(given.get("output", name))
    try:
        if len(row) != len(header):
            raise ValueError(f"has {len(row)} fields where the first line has {len(header)}")
        if missing := [column for column in _NEEDED if column not in given]:
            raise ValueError(f"has no {missing[0]}")
        job = replace(defaults, **{column: _value(column, text) for column, text in given.items()})
        if job.paste and job.size is not None:
            raise ValueError("has paste and a size, but pasted frames are as large as the picture")
        return job
    except ValueError as error:
        return replace(defaults, output=output, fault=f"{name} {error}")


def _value(column: str, text: str) -> Any:
    try:
        return _COLUMNS[column](text)
    except ValueError as error:
        raise ValueError(f"says {column} is {text[:100]!r}, which must be {error}") from None


def _file(text: str) -> Path:
    if text == "-" or "\0" in text:
        raise ValueError("the path of a file")
    return Path(text)


def _number(least: int, most: int) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
            raise ValueError(f"a whole number from {least} to {most}")
        return int(text)

    return parsed


def _real(least: float, most: float) -> Callable[[str], float]:
    def parsed(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise ValueError(f"a number from {least:g} to {most:g}")
        return value

    return parsed


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError("yes or no")
    return text == "yes"


def _one_of(*values: str) -> Callable[[str], str]:
    def parsed(text: str) -> str:
        if text not in values:
            raise ValueError(f"one of {', '.join(values)}")
        return text

    return parsed


_NEEDED = "face", "audio", "output"
_COLUMNS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(_NEEDED, _file),
    "seed": _number(0, LARGEST_SEED),
    "size": _number(*SIZES),
    "steps": _number(1, 100_000),
    "solver": _one_of(*SOLVERS),
    "weights": str,
    "guidance": _real(0, MOST_GUIDANCE),
    "at": _real(0, LAST_SECOND),
    "which": _number(1, 1_000),
    "paste": _yes_or_no,
    "still": _yes_or_no,
    "audio_codec": _one_of(*typing.get_args(AudioCodec)),
}
