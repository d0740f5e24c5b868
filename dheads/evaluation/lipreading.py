"""Lip readers: a command or a Python function of the user's that reads words off a silent video.

The paper's lip reader is private, and a word error rate depends on the reader: compare only what one reader has read,
and let it read the real clips too.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dheads.errors import DheadsError
from dheads.system.signals import undoing

LipReader = Callable[[Path], str]  # video file -> its words

_TIMEOUT_SECONDS = 300


def load_lip_reader(spec: str, *, timeout: float = _TIMEOUT_SECONDS) -> LipReader:
    """Load a lip reader by its specification.

    `python:MODULE:FUNCTION`: a function that takes the path of a video (str) and returns its words. Anything else: a
    command with `{video}` in place of the path, such as `my-reader --fast {video}`. It runs without a shell, for at
    most `timeout` seconds, and prints the words on one line.
    Raises DheadsError for an invalid specification or a reader that is not found; the returned function raises it for
    a video on which the reader fails.
    """
    if spec.startswith("python:"):
        return partial(_call, _imported(spec), spec)
    try:
        command = shlex.split(spec, posix=os.name != "nt")
    except ValueError as error:
        raise DheadsError(f"the lip reader {spec!r} cannot be split into arguments: {error}") from error
    if not any("{video}" in argument for argument in command):
        raise DheadsError(f"the lip reader {spec!r} has no {{video}}; write it where the video's path goes")
    if not shutil.which(command[0]):
        raise DheadsError(f"the lip reader's program {command[0]!r} is not found; install it or give its path")
    return partial(_run, command, timeout)


def _imported(spec: str) -> Callable[[str], object]:
    module, _, name = spec.removeprefix("python:").partition(":")
    if not module or not name:
        raise DheadsError(f"the lip reader {spec!r} is incomplete; write python:MODULE:FUNCTION")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as with `python -m`: modules in the current folder are found
    try:
        function: Callable[[str], object] = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        raise DheadsError(f"the lip reader {spec!r} cannot be loaded: {_in_one_line(error)}") from error
    if not callable(function):
        raise DheadsError(f"the lip reader {spec!r} is no function")
    return function


def _call(function: Callable[[str], object], spec: str, video: Path) -> str:
    try:
        words = function(str(video))
    except Exception as error:  # whatever the user's function raises
        raise DheadsError(f"the lip reader {spec!r} fails on {video}: {_in_one_line(error)}") from error
    if not isinstance(words, str):
        raise DheadsError(f"the lip reader {spec!r} gives no text for {video} but a {type(words).__name__}")
    return words


def _run(command: list[str], timeout: float, video: Path) -> str:
    # The path is absolute so that it cannot look like an option.
    arguments = [argument.replace("{video}", str(video.absolute())) for argument in command]
    name = f"the lip reader {shlex.join(command)!r}"
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        with undoing(partial(_kill, process)):
            output, messages = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise DheadsError(f"{name} takes more than {timeout:g} s for {video}") from error
    finally:
        _stop(process)
    if process.returncode:
        reason = (messages.strip().splitlines() or ["no message"])[-1]
        raise DheadsError(f"{name} fails on {video} with exit code {process.returncode}: {reason}")
    lines = [line for line in output.splitlines() if line.strip()]
    if len(lines) > 1:
        raise DheadsError(f"{name} prints {len(lines)} lines for {video}; it must print one, the words")
    return "".join(lines)


def _stop(process: subprocess.Popen[str]) -> None:
    """Kill a program that still runs, together with its children, which would keep its pipes open."""
    if process.poll() is None:
        _kill(process)
        process.communicate()


def _kill(process: subprocess.Popen[str]) -> None:
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
