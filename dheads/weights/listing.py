"""The list of known weights, weights.toml, and the folders where their files lie."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import Any, TypedDict, cast

from dheads.errors import DheadsError
from dheads.system.files import file_sha256

PACKAGE = Path(__file__).parents[1]
ASSETS = PACKAGE / "assets"


class Entry(TypedDict, total=False):
    """One table of weights.toml, which describes the fields; all but kind, file, license and purpose are optional."""

    kind: str
    file: str
    url: str
    archive: str
    page: str
    ask: bool
    terms: str
    network: dict[str, Any]
    bytes: int
    sha256: str
    license: str
    purpose: str
    data: list[dict[str, str]]


def known() -> dict[str, Entry]:
    """The tables of weights.toml by name. A wheel has the file inside the package, a checkout one level up."""
    path = PACKAGE / "weights.toml"
    if not path.is_file():
        path = PACKAGE.parent / "weights.toml"
    return cast(dict[str, Entry], tomllib.loads(path.read_text(encoding="utf-8")))


def home() -> Path:
    """The folder of downloaded weights: DHEADS_HOME, else `dheads` in the platform's cache folder.

    Raises DheadsError for a user without a home folder.
    """
    try:
        if chosen := os.environ.get("DHEADS_HOME"):
            return Path(chosen).expanduser()
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "dheads"
        windows = sys.platform == "win32"
        variable, default = ("LOCALAPPDATA", "AppData/Local") if windows else ("XDG_CACHE_HOME", ".cache")
        return Path(os.environ.get(variable) or Path.home() / default) / "dheads"
    except RuntimeError:  # neither HOME nor the system's list of users names a folder
        raise DheadsError("this user has no home folder to keep weights in; set DHEADS_HOME to a folder") from None


def is_listed_file(path: Path, entry: Entry) -> bool:
    """Whether `path` is a file of the listed size and sha256."""
    return path.is_file() and path.stat().st_size == entry["bytes"] and file_sha256(path) == entry["sha256"]
