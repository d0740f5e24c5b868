"""Values from the command line that replace those of a preset: first those of a TOML file, then each --set."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import typer

from dheads.errors import DheadsError


def read_changes(file: Path | None, settings: list[str] | None) -> list[dict[str, Any]]:
    """The nested tables of the TOML file and of each KEY=VALUE, in the order in which they replace values.

    Raises DheadsError for a file that cannot be read or is not TOML, and typer.BadParameter for a bad KEY=VALUE.
    """
    return [*([_read_toml(file)] if file else []), *map(_parse_setting, settings or [])]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DheadsError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DheadsError(f"{path} is not a TOML file: {error}") from error


def _parse_setting(text: str) -> dict[str, Any]:
    """sampling.steps=50 -> {"sampling": {"steps": 50}}; a value that is not TOML is a string."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--set")
    *tables, name = key.strip().split(".")
    nested: dict[str, Any] = {name: _toml_value(value)}
    for table in reversed(tables):
        nested = {table: nested}
    return nested


def _toml_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()
