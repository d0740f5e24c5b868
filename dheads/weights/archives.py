"""Zip archives of weights: downloaded whole, then the listed files are taken out of them and checked."""

from __future__ import annotations

import hashlib
import lzma
import re
import zipfile
import zlib
from pathlib import Path

from dheads.errors import DheadsError
from dheads.system.files import complete_or_absent, resumable
from dheads.weights import listing
from dheads.weights.download import receive, size_of
from dheads.weights.listing import Entry, home, is_listed_file

_CHUNK = 1 << 20  # bytes read at a time
_LARGEST_ARCHIVE = 2 << 30  # bytes; an archive has no listed size, and the server's may be wrong
# What zipfile raises for damaged, encrypted or unusual members.
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)


def fetch_archive(url: str, progress: bool = True) -> None:
    """Download an archive and unpack those of its listed files that the cache folder lacks.

    Raises DheadsError, which says how to get the files by hand.
    """
    entries = [entry for entry in listing.known().values() if entry.get("archive") == url]
    missing = [entry for entry in entries if not is_listed_file(home() / entry["file"], entry)]
    names = " and ".join(str(home() / entry["file"]) for entry in missing)
    by_hand = f"get the archive at {missing[0]['page']} with a browser, unpack it and put its files there: {names}"
    archive = (home() / entries[0]["file"]).with_suffix(".zip")
    if not archive.is_file():
        _download_archive(url, archive, by_hand, progress)
    unpack(archive, home(), missing, by_hand)
    archive.unlink()


def _download_archive(url: str, archive: Path, by_hand: str, progress: bool) -> None:
    with resumable(archive) as unfinished:
        total = receive(url, unfinished, _LARGEST_ARCHIVE, f"run again to go on, or {by_hand}", progress)
        largest = _LARGEST_ARCHIVE if total is None else min(total, _LARGEST_ARCHIVE)
        if total is not None and size_of(unfinished) < largest:
            raise DheadsError(f"the download of {url} stopped early; run again to go on, or {by_hand}")
        if size_of(unfinished) > largest:
            unfinished.unlink()
            raise DheadsError(f"{url} gives more than the archive that was expected, so it was removed; {by_hand}")


def unpack(archive: Path, folder: Path, wanted: list[Entry], by_hand: str) -> None:
    """Put the wanted files of a zip archive into `folder`.

    They are found by name, in any folder of the archive. Each appears only with the listed size and sha256.
    Raises DheadsError, which ends with `by_hand`: a file that is not a zip archive is kept, an archive without the
    wanted files is removed.
    """
    try:
        bundle = zipfile.ZipFile(archive)
    except (*_DAMAGED, OSError) as error:
        raise DheadsError(f"{archive} is not the zip archive that was expected: delete it and {by_hand}") from error
    with bundle:
        bad = [entry["file"] for entry in wanted if not _extract(bundle, folder / entry["file"], entry)]
    if bad:
        archive.unlink()
        raise DheadsError(
            f"the archive holds no {' or '.join(bad)} of the right size and sha256, so it was removed; {by_hand}"
        )


def _extract(bundle: zipfile.ZipFile, path: Path, entry: Entry) -> bool:
    """Whether a member of that name is the listed file, which is then at `path`."""
    for member in bundle.infolist():
        if re.split(r"[/\\]", member.filename)[-1] != entry["file"] or member.file_size != entry["bytes"]:
            continue
        try:
            with complete_or_absent(path) as part:
                if _copy(bundle, member, part, entry["bytes"]) != entry["sha256"]:
                    raise zipfile.BadZipFile("another file of that name")
            return True
        except _DAMAGED:
            continue
        except OSError as error:
            raise DheadsError(f"cannot unpack {path}: {error.strerror or error}") from error
    return False


def _copy(bundle: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, size: int) -> str:
    """Unpack at most `size` bytes, as an archive may lie about sizes. Returns their sha256, or "" where more follow."""
    digest = hashlib.sha256()
    with bundle.open(member) as source, path.open("wb") as file:
        while chunk := source.read(_CHUNK):
            size -= len(chunk)
            if size < 0:
                return ""
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
