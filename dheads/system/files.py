"""Files: temporary names until a file is complete, hashes, and output to pipes and devices."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from dheads.errors import DheadsError
from dheads.system.signals import undoing

PART = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part", re.DOTALL)  # the names that `part_of` gives; group 1: the final name


def as_path(file: str | os.PathLike[str] | BinaryIO) -> Path | BinaryIO:
    """A path as a Path; a stream is returned as it is."""
    return Path(file) if isinstance(file, str | os.PathLike) else file


# --- Complete or absent


def part_of(path: Path) -> Path:
    """A new temporary name for `path`, in the same folder."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.part")


def unfinished_in(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the temporary files in a folder, which killed processes leave, each with the final name of the file."""
    for path in folder.glob(".*.part"):
        if match := PART.fullmatch(path.name):
            yield path, match[1]


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """A temporary file name that becomes `path` where the block succeeds; where it fails, the file is deleted.

    If `path` is a link, the file that it points to is replaced. Raises OSError as `target_of` does.
    """
    target = target_of(path)
    part = part_of(target)
    with undoing(partial(part.unlink, missing_ok=True)):
        try:
            yield part
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def complete_or_absent_folder(path: Path) -> Iterator[Path]:
    """A new temporary folder that becomes `path` where the block succeeds; where it fails, the folder is deleted.

    Raises OSError where the folder cannot be made, and where `path` exists and is not an empty folder.
    """
    part = part_of(path)
    remove = partial(shutil.rmtree, part, ignore_errors=True)
    with undoing(remove):
        try:
            part.mkdir(parents=True)
            yield part
            part.rename(path)
        finally:
            remove()


@contextmanager
def resumable(path: Path) -> Iterator[Path]:
    """The fixed temporary name of a file; it becomes `path` where the block succeeds.

    Where the block fails, the file stays, for a later run to continue it.
    """
    part = path.with_name(f"{path.name}.part")
    yield part
    os.replace(part, path)


def target_of(path: Path) -> Path:
    """The file to write for `path`: the path itself or, if it is a link, the file that it points to.

    Raises OSError, with the reason in strerror, for anything that must not be replaced: a folder, a pipe or device,
    a read-only file.
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
    # Replacing a file takes no permission to write it, and root needs no permission at all.
    if not mode & 0o222 or not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "it is read-only; choose another name, or make it writable")
    return target


def file_sha256(path: Path) -> str:
    """The file's sha256 as hex. Raises DheadsError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DheadsError(f"cannot read {path}: {error.strerror}") from error


# --- Pipes and devices


def is_endless(path: Path) -> bool:
    """Whether the path is a pipe or a device, from which a read may wait for ever or never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: not a valid path
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


class Stream:
    """Writes each piece of data through at once, for a reader that waits for it."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name, self._file = name, file

    def write(self, data: bytes) -> int:
        """Write all of `data` and flush it; returns its length. Raises OSError."""
        self._file.write(data)
        self._file.flush()
        return len(data)


@contextmanager
def stream_into(path: Path) -> Iterator[Stream]:
    """A stream into a pipe or a device; opening a pipe waits for its reader. Raises OSError, also for a terminal."""
    with path.open("wb") as file:
        if file.isatty():
            raise OSError(errno.EINVAL, "it is a terminal; give the name of a file")
        yield Stream(file, str(path))
