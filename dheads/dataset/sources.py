"""Raw files: what a raw folder holds, and the clips that its files become."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from dheads.errors import DheadsError

_NAME_BYTES = 180  # of one path component; file systems allow 255, and endings and temporary names add to it


@dataclass(frozen=True, slots=True)
class Source:
    """One raw clip, with the speaker and split that it belongs to. Paths are posix paths below the raw folder."""

    name: str  # of the picture, a video or a photo
    clip: str  # <folder>/<name>, unique, and harmless as a path
    speaker: str
    split: str  # train, val or test
    sound: str | None = None  # a sound file; None: the sound of the video
    landmarks: str | None = None  # .npy (F, 68, 2 or 3), px of the video
    embeddings: str | None = None  # .pth (F, D)


# --- Folders


def check_folder(raw: Path) -> None:
    """Raises DheadsError where `raw` is not a folder."""
    if not os.path.isdir(raw):
        raise DheadsError(f"{raw}: is not a folder; give the folder that holds the raw videos")


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder in no order, without hidden ones, such as a file system's own.

    Raises DheadsError where the folder cannot be read.
    """
    try:
        with os.scandir(folder) as listing:
            yield from (entry for entry in listing if not entry.name.startswith("."))
    except OSError as error:
        raise DheadsError(f"{folder}: cannot be listed ({error.strerror}); make it readable or move it away") from error


def subfolder(raw: Path, name: str) -> str | None:
    """The actual name of the folder `name` in `raw`, which may differ in case; None where there is none."""
    names = (e.name for e in entries(raw) if e.name.lower() == name.lower() and os.path.isdir(e.path))
    return min(names, default=None)


def files(raw: Path, below: str, endings: Collection[str], skipped: Counter[str]) -> Iterator[str]:
    """Yield the posix paths below `raw` of the files with these endings in its subfolder `below`, in no order.

    All other files are counted in `skipped` by their kind. Links to folders are not followed.
    """
    folders = [below]
    while folders:
        folder = folders.pop()
        for entry in entries(raw / folder):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
                continue
            ending = os.path.splitext(entry.name)[1].lower()
            if not os.path.isfile(entry.path):
                skipped["links to folders" if os.path.isdir(entry.path) else "links to nothing, or pipes"] += 1
            elif ending not in endings:
                skipped[ending or "files without an ending"] += 1
            else:
                _check_utf8(raw, name)
                yield name


# --- Names


def _check_utf8(raw: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:  # POSIX file names are bytes, but the tables are UTF-8
        raise DheadsError(f"{raw}: the name {name!a} is not UTF-8; rename the file") from error


def stem_of(name: str) -> str:
    """The file's name without folders and ending."""
    return name.rpartition("/")[2].rpartition(".")[0]


def safe_name(name: str) -> str:
    """A name like the given one that is a single harmless path component of limited length."""
    safe = re.sub(r"[^\w.-]+", "_", name).strip(".") or "_"
    if len(safe.encode()) <= _NAME_BYTES:
        return safe
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{safe.encode()[:_NAME_BYTES].decode(errors='ignore')}_{digest}"
