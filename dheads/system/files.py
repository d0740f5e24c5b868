"""Whole files or none: what is being written has a name of its own until it is complete. And what is no file."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from dheads.system.ending import undoing

PART = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part", re.DOTALL)  # what `part_of` calls a file; group 1: the file's name


def as_path(place: str | os.PathLike[str] | BinaryIO) -> Path | BinaryIO:
    """A path, however it is given; a stream stays one."""
    return Path(place) if isinstance(place, str | os.PathLike) else place


def part_of(path: Path) -> Path:
    """A new name beside `path` for as long as it is not complete."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.part")


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name if the block ends well, and vanishes if not.

    Where `path` is a link, all this is of the file that it points to. Raises OSError as `target_of` does.
    """
    target = target_of(path)
    part = part_of(target)
    with undoing(partial(part.unlink, missing_ok=True)):
        try:
            yield part
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def target_of(path: Path) -> Path:
    """The file to write where `path` is named: itself, or what it points to as a link.

    Raises OSError, whose strerror says why, where something is there that must not be replaced.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder; give the name of a file")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no file; give the name of one")
    # To replace a file takes no permission to write it, and root needs none at all.
    if not mode & 0o222 or not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "it is read-only; choose another name, or make it writable")
    return target


def is_endless(path: Path) -> bool:
    """Whether it is a pipe or a device, which may never begin, or never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: no path at all
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


class Stream:
    """Takes data part by part, for somebody who reads at the same time."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name, self._file = name, file

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._file.flush()
        return len(data)


@contextmanager
def stream_into(path: Path) -> Iterator[Stream]:
    """A stream into a pipe or a device; opening a pipe waits for its reader. Raises OSError."""
    with path.open("wb") as file:
        if file.isatty():
            raise OSError(errno.EINVAL, "it is a terminal; give the name of a file")
        yield Stream(file, str(path))
