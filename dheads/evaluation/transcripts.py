"""The words spoken in real clips, and the error rate of what a lip reader reads."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from dheads.errors import DheadsError

_MAX_TEXT_BYTES = 1_000_000
_LRW_NAME = re.compile(r"([A-Z']+)_\d{5}")  # LRW gives the word only in the file's name


def spoken_words(clip: Path) -> str | None:
    """The words spoken in a real clip; None if neither its name nor a text file gives them.

    An LRW name, such as ABOUT_00001, is the word. Otherwise the text file of the same name holds them: its line
    `Text: ...`, or all of it if it has no such line.
    Raises DheadsError for an unreadable text file.
    """
    lrw_name = _LRW_NAME.fullmatch(clip.stem)
    if lrw_name:
        return lrw_name[1]
    path = clip.with_suffix(".txt")
    if not path.is_file():
        return None
    text = _read_text(path)
    marked = re.search(r"^Text:(.*)$", text, re.MULTILINE)
    return (marked[1] if marked else text).strip() or None


def read_words(path: Path) -> dict[str, str]:
    """The spoken words by clip, from a CSV file with the columns clip and words.

    Raises DheadsError for any other file, and for a clip without words.
    """
    try:
        rows = list(csv.DictReader(_read_text(path).splitlines(), strict=True))
    except csv.Error as error:
        raise DheadsError(f"{path} is no CSV file: {error}") from error
    if not rows or not {"clip", "words"} <= rows[0].keys():
        raise DheadsError(f"{path} lacks the columns clip and words, or has no row")
    words = {row["clip"]: (row["words"] or "").strip() for row in rows}
    empty = next((clip for clip, spoken in words.items() if not spoken), None)
    if empty is not None:
        raise DheadsError(f"{path} has no words for the clip {empty!r}; add them or leave the row out")
    return words


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_TEXT_BYTES + 1)
        if len(content) > _MAX_TEXT_BYTES:
            raise DheadsError(f"{path} has more than {_MAX_TEXT_BYTES} bytes; give a text file with the words")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise DheadsError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DheadsError(f"{path} is no UTF-8 text; save it as UTF-8") from error


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """(substitutions + deletions + insertions) / reference words, over all clips together; it can exceed 1.

    Case and punctuation are ignored. Raises DheadsError without the package jiwer, and for a reference without words.
    """
    try:
        import jiwer
    except ImportError as error:
        raise DheadsError("the word error rate needs the package jiwer: pip install 'dheads[eval]'") from error
    if len(references) != len(hypotheses):
        raise DheadsError(f"there are {len(references)} references, but {len(hypotheses)} clips were read")
    spoken, read = [_normalised(text) for text in references], [_normalised(text) for text in hypotheses]
    if not spoken or not all(spoken):
        raise DheadsError("a clip without words in its reference has no word error rate; leave it out")
    return float(jiwer.wer(spoken, read))


def _normalised(text: str) -> str:
    """Lower-case words without punctuation, separated by one space; an apostrophe belongs to its word."""
    return " ".join(re.sub(r"[^\w\s']|_", " ", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")).split())
