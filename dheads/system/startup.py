"""The environment of a process at its start: closed or full streams, missing libraries, a deleted working folder."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import traceback
from typing import TYPE_CHECKING, TextIO

from dheads.errors import DheadsError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_OPENCV = (
    "opencv-python needs the system library {name} ({reason}): install its package (Debian, Ubuntu: apt-get install "
    "libgl1 libglib2.0-0), or take the package that needs none (pip uninstall opencv-python, then pip install "
    "opencv-python-headless)"
)
_TORCHAUDIO = (
    "torchaudio does not fit the installed torch ({reason}): install both from one source (pip install "
    "--force-reinstall torch torchaudio, with the same --index-url for both)"
)
_MEMORY = "the memory that this process may use is too small ({reason}): close other programs, or raise its limit"


def open_streams() -> None:
    """Give this process a stderr that never fails, even when its reader is gone, and a stdout that fails only once.

    Closed streams are opened on the null device; otherwise a file opened later would get their number, and what
    libraries write to it. Streams that were replaced, as by a test, are left alone.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stderr is sys.__stderr__ and _may_fail(sys.stderr):
        sys.stderr = _text(_Stderr(2, "wb", closefd=False), sys.stderr)
    if sys.stdout is not None and sys.stdout is sys.__stdout__ and _may_fail(sys.stdout):
        sys.stdout = _text(_Stdout(1, "wb", closefd=False), sys.stdout)


def _may_fail(stream: TextIO | None) -> bool:
    return not (sys.platform == "win32" and stream is not None and stream.isatty())  # its consoles are no files


def _text(raw: io.FileIO, old: TextIO | None) -> TextIO:
    encoding, errors = (old.encoding, old.errors) if old else ("utf-8", "backslashreplace")
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=True)


class _Stderr(io.FileIO):
    """Drops what cannot be written."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data) or memoryview(data).nbytes
        except OSError:
            return memoryview(data).nbytes


class _Stdout(io.FileIO):
    """Reports the first failed write and drops the rest, as the flush at the program's end would fail again."""

    failed = False

    def write(self, data: Buffer, /) -> int:
        if self.failed:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self.failed = True
            if error.errno == errno.EPIPE:
                raise
            raise DheadsError(f"cannot write to stdout: {error.strerror} (what was made is complete)") from error


def check_folder() -> None:
    """Raises DheadsError where the working folder was deleted, which makes libraries crash."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise DheadsError("the working folder was deleted; change to one that exists") from None


def lacking(error: BaseException) -> str | None:
    """What to do about an error for lack of memory, or of a library that OpenCV or torchaudio needs; None for any other
    error."""
    text = str(error)
    library = re.search(r"([^\s/:]+\.so[.\d]*): (.+)", text)
    memory = re.search("can't allocate memory|out of memory|failed to map segment[^:]*$", text)
    if memory or isinstance(error, MemoryError):
        return _MEMORY.format(reason=library[0] if library else text.partition("\n")[0] or "out of memory")
    frames = traceback.walk_tb(error.__traceback__)
    packages = {frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in frames}
    if library and "cv2" in packages:
        return _OPENCV.format(name=library[1], reason=library[2])
    if "torchaudio" in packages and (library or "different CUDA versions" in text):
        return _TORCHAUDIO.format(reason=library[0] if library else "they are for different CUDA versions")
    return None
