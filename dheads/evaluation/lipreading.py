"""Word error rate: what somebody's own lip reader makes of a video, against what was said.

The paper's lip reader is private (table 1, WER), and the figure depends on the reader: compare only what one and the
same reader has read, and read the real clips too.
"""

from __future__ import annotations

import csv
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dheads.errors import DheadsError
from dheads.system.signals import undoing

LipReader = Callable[[Path], str]  # a video's path -> its words

_TIMEOUT_S = 300
_MAX_TEXT_BYTES = 1_000_000
_LRW_NAME = re.compile(r"([A-Z']+)_\d{5}")  # LRW says the word in the file's name only


# ---- Readers ----


def load_lip_reader(spec: str, *, timeout: float = _TIMEOUT_S) -> LipReader:
    """A lip reader by its description.

    `python:MODULE:FUNCTION`: a function that takes a video's path (str) and returns its words. Anything else: a command
    with `{video}` where the path goes, such as `my-reader --fast {video}`. It runs without a shell, ends within
    `timeout` seconds, and prints the words in one line.
    Raises DheadsError for what cannot be found; the reader itself for a video that it fails on.
    """
    if spec.startswith("python:"):
        return partial(_call, _imported(spec), spec)
    try:
        command = shlex.split(spec, posix=os.name != "nt")
    except ValueError as error:
        raise DheadsError(f"the lip reader {spec!r} cannot be taken apart: {error}") from error
    if not any("{video}" in word for word in command):
        raise DheadsError(f"the lip reader {spec!r} has no {{video}}; write it where the video's path goes")
    if not shutil.which(command[0]):
        raise DheadsError(f"the lip reader's program {command[0]!r} is not found; install it or give its path")
    return partial(_run, command, timeout)


def _imported(spec: str) -> Callable[[str], str]:
    module, _, function = spec.removeprefix("python:").partition(":")
    if not module or not function:
        raise DheadsError(f"the lip reader {spec!r} is incomplete; write python:MODULE:FUNCTION")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` has it: a file in the current folder is a module
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module raises
        raise DheadsError(f"the lip reader {spec!r} cannot be loaded: {_in_one_line(error)}") from error
    if not callable(found):
        raise DheadsError(f"the lip reader {spec!r} is no function")
    return found


def _call(function: Callable[[str], str], spec: str, video: Path) -> str:
    try:
        words = function(str(video))
    except Exception as error:  # whatever the user's function raises
        raise DheadsError(f"the lip reader {spec!r} fails on {video}: {_in_one_line(error)}") from error
    if not isinstance(words, str):
        raise DheadsError(f"the lip reader {spec!r} gives no text for {video} but a {type(words).__name__}")
    return words


def _run(command: list[str], timeout: float, video: Path) -> str:
    # An absolute path is never taken for an option.
    words = [word.replace("{video}", str(video.absolute())) for word in command]
    name = f"the lip reader {shlex.join(command)!r}"
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        with undoing(partial(_kill, process)):
            output, complaint = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise DheadsError(f"{name} takes more than {timeout:g} s for {video}") from error
    finally:
        _end(process)
    if process.returncode:
        reason = (complaint.strip().splitlines() or ["no message"])[-1]
        raise DheadsError(f"{name} fails on {video} with exit code {process.returncode}: {reason}")
    lines = [line for line in output.splitlines() if line.strip()]
    if len(lines) > 1:
        raise DheadsError(f"{name} prints {len(lines)} lines for {video}; it must print one, the words")
    return "".join(lines)


def _end(process: subprocess.Popen) -> None:
    """Stop a program that still runs, with those that it started: they would keep its pipes open."""
    if process.poll() is None:
        _kill(process)
        process.communicate()


def _kill(process: subprocess.Popen) -> None:
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# ---- References ----


def spoken_words(clip: Path) -> str | None:
    """What is said in a real clip, if its surroundings tell.

    From the text file of the same name: its line `Text: ...`, or all of it where it has no such lines. LRW's text files
    hold no words, its names do: ABOUT_00001.
    Raises DheadsError for an unreadable text file.
    """
    in_name = _LRW_NAME.fullmatch(clip.stem)
    if in_name:
        return in_name[1]
    path = clip.with_suffix(".txt")
    if not path.is_file():
        return None
    text = _text(path)
    marked = re.search(r"^Text:(.*)$", text, re.MULTILINE)
    return (marked[1] if marked else text).strip() or None


def read_words(path: Path) -> dict[str, str]:
    """What is said, by clip: a CSV file with the columns clip and words. Raises DheadsError for any other file."""
    try:
        rows = list(csv.DictReader(_text(path).splitlines(), strict=True))
    except csv.Error as error:
        raise DheadsError(f"{path} is no CSV file: {error}") from error
    if not rows or not {"clip", "words"} <= rows[0].keys():
        raise DheadsError(f"{path} lacks the columns clip and words, or has no row")
    words = {row["clip"]: (row["words"] or "").strip() for row in rows}
    empty = next((clip for clip, said in words.items() if not said), None)
    if empty is not None:
        raise DheadsError(f"{path} has no words for the clip {empty!r}; add them or leave the row out")
    return words


def _text(path: Path) -> str:
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


# ---- The measure ----


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """(substitutions + deletions + insertions) / words said, over all clips together; it may exceed 1.

    Upper and lower case and punctuation do not count. Raises DheadsError where the package jiwer is missing, and for
    references without a word.
    """
    try:
        import jiwer
    except ImportError as error:
        raise DheadsError("the word error rate needs the package jiwer: pip install 'dheads[eval]'") from error
    if len(references) != len(hypotheses):
        raise DheadsError(f"there are {len(references)} references, but {len(hypotheses)} clips were read")
    said, read = [_plain(text) for text in references], [_plain(text) for text in hypotheses]
    if not said or not all(said):
        raise DheadsError("a clip without words in its reference has no word error rate; leave it out")
    return float(jiwer.wer(said, read))


def _plain(text: str) -> str:
    """Words in lower case without punctuation, one blank between them; an apostrophe belongs to its word."""
    return " ".join(re.sub(r"[^\w\s']|_", " ", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")).split())
