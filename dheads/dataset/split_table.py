"""A CSV of the user's with the columns clip, speaker and split, which replace those of the layout."""

from __future__ import annotations

import csv
import logging
import sys
from dataclasses import replace
from pathlib import Path

from dheads.dataset.sources import Source, safe_name
from dheads.dataset.splits import SPLITS
from dheads.errors import DheadsError

log = logging.getLogger("dheads")


def assign_splits(sources: list[Source], raw: Path, path: Path) -> list[Source]:
    """The sources that the CSV names, with its speakers and splits; clips that it names in vain are logged.

    Raises DheadsError for a CSV that cannot be read, contradicts itself, or names none of the sources.
    """
    rows = _read_rows(path)
    chosen = []
    for source in sources:
        if source.name not in rows:
            continue
        speaker, split = rows.pop(source.name)
        clip = f"{safe_name(speaker)}/{source.clip.partition('/')[2]}"
        chosen.append(replace(source, clip=clip, speaker=speaker, split=split))
    if not chosen:
        example = min(source.name for source in sources)
        raise DheadsError(f"{path}: names no file below {raw}; its clips are paths such as {example}")
    if rows:
        log.warning("%s: %d of its clips are not below %s, such as %s", path, len(rows), raw, min(rows))
    return chosen


def _read_rows(path: Path) -> dict[str, tuple[str, str]]:
    """clip -> (speaker, split)"""
    rows: dict[str, tuple[str, str]] = {}
    speaker_splits: dict[str, str] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin files with a byte order mark
            table = csv.DictReader(file)
            for row in table:
                clip, speaker, split = row["clip"], row["speaker"], row["split"]
                if not (clip and speaker):
                    raise DheadsError(f"{path}: line {table.line_num} has no clip or no speaker; fill it in")
                if split not in SPLITS:
                    raise DheadsError(f"{path}: {clip} is in split {split!r}; use train, val or test")
                if speaker_splits.setdefault(speaker, split) != split:
                    raise DheadsError(
                        f"{path}: speaker {speaker} is in {speaker_splits[speaker]} and in {split}; choose one"
                    )
                if rows.setdefault(clip, (sys.intern(speaker), sys.intern(split))) != (speaker, split):
                    raise DheadsError(f"{path}: {clip} has two speakers, {rows[clip][0]} and {speaker}; choose one")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DheadsError(f"{path}: cannot be read ({error}); it must be a CSV with clip, speaker, split") from error
    except KeyError as error:
        raise DheadsError(f"{path}: has no column {error}; it must be a CSV with clip, speaker, split") from error
    return rows
