"""Licences that a user must accept before weights are used. The answer is remembered by source page."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dheads.errors import DheadsError
from dheads.system.files import complete_or_absent
from dheads.weights import listing
from dheads.weights.listing import Entry, home


def consent(name: str) -> str | None:
    """The licence terms to show a user before the named weights or speech encoder are used.

    None where nothing need be accepted, or it is accepted already. The path of a checkpoint stands for the speech
    encoder that it names.
    """
    name = _asked_name(name)
    entry = listing.known().get(name, {})
    return question(name, entry) if asks(entry) else None


def accept(name: str) -> None:
    """Remember that the user accepts the licence of the named weights, and of all others from the same page.

    Raises DheadsError where that cannot be written.
    """
    entry = listing.known().get(_asked_name(name), {})
    if not asks(entry):
        return
    path = home() / "accepted.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_or_absent(path) as part:
            part.write_text(json.dumps({**_accepted(), entry["page"]: entry["license"]}, indent=2), encoding="utf-8")
    except OSError as error:
        raise DheadsError(f"cannot write {path}: {error.strerror}") from error


def asks(entry: Entry) -> bool:
    """Whether a user must still accept the licence of these weights."""
    return entry.get("ask", False) and _accepted().get(entry["page"]) != entry["license"]


def question(name: str, entry: Entry) -> str:
    """What a user is asked to accept, in one line."""
    return f"{name}: {entry['purpose']} Its licence is {entry['license']}: {entry['terms']} Source: {entry['page']}"


def _asked_name(name: str) -> str:
    return _speech_encoder_of(Path(name)) if Path(name).is_file() else name


def _speech_encoder_of(path: Path) -> str:
    """The encoder's name in a checkpoint's metadata; empty for any other file, which loading refuses."""
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})["config"])
        return str(values["conditioning"]["speech_encoder"])
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError):
        return ""


def _accepted() -> dict[str, str]:
    """Licence by page."""
    try:
        accepted = json.loads((home() / "accepted.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return accepted if isinstance(accepted, dict) else {}
