"""The tables of a prepared folder: the clips that it holds, and the raw files that could not be used.

clips.csv     clip, speaker, split, frames, source, offset_ms, sync; complete, or absent
failed.csv    source, reason; grows while `dheads prepare` runs

A shard writes clips.3-of-16.csv and failed.3-of-16.csv: shards are merged by copying them into one folder.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from dheads.errors import DheadsError
from dheads.system.files import complete_or_absent

CLIP_COLUMNS = ("clip", "speaker", "split", "frames", "source")
SYNC_COLUMNS = ("offset_ms", "sync")  # absent from the tables of earlier versions
FAILED_COLUMNS = ("source", "reason")
Shard = tuple[int, int]  # which of how many, from 1

_TABLE_OF_CLIPS = re.compile(r"clips(?:\.(\d+)-of-(\d+))?\.csv")


@dataclass(frozen=True, slots=True)
class Clip:
    """One row of clips.csv. A photo is a clip of one frame."""

    clip: str  # <folder>/<name>
    speaker: str
    split: str  # train, val or test
    frames: int
    source: str  # the path below the raw folder
    offset_ms: float | None = None  # by which the picture is late in the raw clip; None where it was not measured
    sync: float | None = None  # correlation there of the mouth's opening that is seen with the one that is heard

    @property
    def moves(self) -> bool:
        """Whether it has more than one frame."""
        return self.frames > 1


def shard_path(root: Path, name: str, shard: Shard | None) -> Path:
    """`root`/clips.csv or, for a shard, `root`/clips.3-of-16.csv."""
    stem, _, ending = name.rpartition(".")
    return root / (name if shard is None else f"{stem}.{shard[0]}-of-{shard[1]}.{ending}")


def clip_path(root: Path, clip: str, ending: str) -> Path:
    """A clip's file with that ending: its pictures and sound (mp4), or its labels (safetensors)."""
    return root / "clips" / f"{clip}.{ending}"


# --- Clips -----------------------------------------------------------------------------------------------------------


def read_clips(root: Path) -> list[Clip]:
    """The clips of all tables in a prepared folder, sorted by name.

    Raises DheadsError where there is no table, where one is damaged or contradicts another, and for missing shards.
    """
    tables = _tables(root)
    if not tables:
        raise DheadsError(f"{root}: holds no clips.csv; let dheads prepare run to its end first")
    _check_shards(root, tables)
    clips: dict[str, Clip] = {}
    for path in tables:
        for clip in _rows(path):
            if clips.setdefault(clip.clip, clip) != clip:
                raise DheadsError(f"{path}: another table says otherwise of {clip.clip}; delete the one out of date")
    return [clips[name] for name in sorted(clips)]


def standing_splits(root: Path) -> dict[str, str]:
    """speaker -> split, from the tables of clips that exist so far, which may be those of some shards only.

    Raises DheadsError for a damaged table.
    """
    return {clip.speaker: clip.split for path in _tables(root) for clip in _rows(path)}


def write_clips(root: Path, clips: Iterable[Clip], shard: Shard | None = None) -> None:
    """Write the table of clips, or that of a shard. Raises DheadsError where it cannot be written."""
    _write_table(shard_path(root, "clips.csv", shard), CLIP_COLUMNS + SYNC_COLUMNS, map(astuple, clips))


def _tables(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if _TABLE_OF_CLIPS.fullmatch(path.name)) if root.is_dir() else []


def _check_shards(root: Path, tables: list[Path]) -> None:
    present: dict[int, set[int]] = {}
    for path in tables:
        match = _TABLE_OF_CLIPS.fullmatch(path.name)
        if match and match[2]:
            present.setdefault(int(match[2]), set()).add(int(match[1]))
    for count, numbers in present.items():
        if len(numbers) < count:
            missing = [f"{number}/{count}" for number in range(1, min(count, 100_000) + 1) if number not in numbers]
            named = ", ".join(missing[:16]) + (", ..." if missing[16:] else "")
            raise DheadsError(f"{root}: the clips of shard {named} are missing; prepare them or copy them here")


def _rows(path: Path) -> Iterator[Clip]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if missing := set(CLIP_COLUMNS) - set(table.fieldnames or ()):
                raise ValueError(f"it has no column {min(missing)}")
            for row in table:
                if None in row.values():
                    raise ValueError("a row is cut short")
                # Interned, because hundreds of thousands of rows share few speakers and splits.
                speaker, split = sys.intern(row["speaker"]), sys.intern(row["split"])
                sync = (float(row[column]) if row.get(column) else None for column in SYNC_COLUMNS)
                clip = Clip(row["clip"], speaker, split, int(row["frames"]), row["source"], *sync)
                if not _is_safe(clip.clip) or clip.frames < 1:
                    raise DheadsError(f"{path}: {clip.clip!r} is not a valid clip; prepare the data again")
                yield clip
    except (OSError, ValueError, csv.Error) as error:
        raise DheadsError(f"{path}: cannot be read ({error}); prepare the data again") from error


def _is_safe(name: str) -> bool:
    """Whether a clip's path stays within the dataset's folder, also in a dataset from an untrusted source."""
    return ":" not in name and not {"", ".", ".."} & set(re.split(r"[/\\]", name))


# --- Failures --------------------------------------------------------------------------------------------------------


class FailedTable:
    """failed.csv of a run. Each row is written as soon as it is added, so that a killed run loses none."""

    def __init__(self, root: Path, shard: Shard | None, sources: Iterable[str]) -> None:
        """Start with the rows of an earlier run whose source is one of `sources`.

        Raises DheadsError where the table cannot be read or written.
        """
        self.path = shard_path(root, "failed.csv", shard)
        listed = set(sources)
        self.reasons = {source: reason for source, reason in self._read() if source in listed}
        self.finish()  # drops a last row that was cut short

    def add(self, source: str, reason: str) -> None:
        """Append a row. Raises DheadsError where it cannot be written."""
        self.reasons[source] = reason
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow((source, reason))
        except OSError as error:
            raise DheadsError(f"cannot write {self.path}: {error.strerror}") from error

    def finish(self) -> None:
        """Sort the file, so that it does not depend on the order in which files failed. Raises DheadsError."""
        _write_table(self.path, FAILED_COLUMNS, sorted(self.reasons.items()))

    def _read(self) -> list[list[str]]:
        try:
            content = self.path.read_bytes()
            complete = content[: content.rfind(b"\n") + 1].decode()  # the last row may be cut short
            return [row for row in csv.reader(io.StringIO(complete, newline="")) if len(row) == len(FAILED_COLUMNS)]
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DheadsError(f"{self.path}: cannot be read ({error}); delete it to try its files again") from error


def _write_table(path: Path, header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    try:
        with complete_or_absent(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
    except OSError as error:
        raise DheadsError(f"cannot write {path}: {error.strerror}") from error
