"""From the name of known weights to their file: packaged, cached, or downloaded now. Every file's hash is checked."""

from __future__ import annotations

from pathlib import Path

from dheads.errors import DheadsError
from dheads.weights import licences, listing
from dheads.weights.archives import fetch_archive
from dheads.weights.download import download, own_turn
from dheads.weights.listing import home, is_listed_file


def resolve(name_or_path: str, progress: bool = True) -> Path:
    """The file at that path, else the file of the model of that name in weights.toml.

    progress: whether a download shows a bar. Raises DheadsError, which lists the known names, for any other.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    models = [name for name, entry in listing.known().items() if entry["kind"] in {"model", "released"}]
    if name_or_path not in models:
        names = ", ".join(sorted(models))
        raise DheadsError(f"weights {name_or_path!r} are neither a file nor a known name; the known names are: {names}")
    return fetch(name_or_path, progress)


def fetch(name: str, progress: bool = True) -> Path:
    """The file of that name in weights.toml, its hash checked.

    Raises DheadsError where its licence is not accepted yet, where a packaged file is damaged, and where a download
    fails.
    """
    entry = listing.known()[name]
    if licences.asks(entry):
        raise DheadsError(f"{licences.question(name, entry)}; run again with --accept-license to accept")
    if "url" not in entry and "archive" not in entry:
        packaged = listing.ASSETS / entry["file"]
        if not is_listed_file(packaged, entry):
            raise DheadsError(f"the packaged weights {packaged} are missing or damaged; reinstall dheads")
        return packaged
    path = home() / entry["file"]
    if is_listed_file(path, entry):
        return path
    with own_turn(home()):
        if is_listed_file(path, entry):  # another process, waited for, downloaded it
            return path
        if "archive" in entry:
            fetch_archive(entry["archive"], progress)
        else:
            download(entry["url"], path, entry["sha256"], entry["bytes"], progress)
    return path


def cached(name: str) -> Path | None:
    """The file of that name in weights.toml if it is in the cache folder with the right hash. Downloads nothing."""
    entry = listing.known()[name]
    path = home() / entry["file"]
    return path if is_listed_file(path, entry) else None
