"""What the commands print: results to stdout; messages and errors to stderr, one line each."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from dheads.dataset.prepare import Summary
    from dheads.sampling.talker import Result


def printable(text: str) -> str:
    """The text with line breaks and terminal escape codes, which file names may contain, as backslash escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def message(text: str) -> None:
    """Print one line to stderr."""
    typer.echo(printable(text), err=True)


def print_json(values: Mapping[str, object]) -> None:
    """Print one line of JSON to stdout; paths become strings."""
    typer.echo(json.dumps(values, default=str))


def print_result(result: Result | Summary, as_json: bool) -> None:
    """Print the path of the result, or all its fields as JSON, to stdout."""
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        typer.echo(result.path)


def print_failed(failed: Iterable[tuple[str, str]]) -> None:
    """Print a line per (name, reason) of what is not in the result to stderr."""
    for name, reason in failed:
        message(f"left out {name}: {reason}")


def configure_log(quiet: bool, as_json: bool = False) -> None:
    """Send the package's log to stderr: all of it, only warnings if `as_json`, nothing if `quiet`."""
    log = logging.getLogger("dheads")
    log.handlers = [_Stderr()]
    log.setLevel(logging.CRITICAL if quiet else logging.WARNING if as_json else logging.INFO)


class _Stderr(logging.Handler):
    """Prints log records to stderr above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(printable(f"{prefix}{record.getMessage()}"), file=sys.stderr)
