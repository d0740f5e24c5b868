"""Whole files or none: what is being written has a name of its own until it is complete."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part", re.DOTALL)  # what `part_of` calls a file; group 1: the file's name


def part_of(path: Path) -> Path:
    """A new name beside `path` for as long as it is not complete."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.part")


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name if the block ends well, and vanishes if not."""
    part = part_of(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def is_endless(path: Path) -> bool:
    """Whether it is a pipe or a device, which may never begin, or never end."""
    return path.is_fifo() or path.is_char_device()
