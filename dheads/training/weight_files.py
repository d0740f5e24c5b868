"""The weights files in a run folder."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from dheads.errors import DheadsError
from dheads.system.files import complete_or_absent

_NUMBERED = re.compile(r"weights-(\d{7,})\.safetensors")


def numbered(run: Path, step: int) -> Path:
    """The path of the weights after that step."""
    return run / f"weights-{step:07d}.safetensors"


def publish(source: Path, target: Path) -> None:
    """Make `target` a second name of the file `source`, atomically. Raises DheadsError where that fails."""
    try:
        with complete_or_absent(target) as part:
            try:
                os.link(source, part)
            except OSError:  # a file system without hard links
                shutil.copyfile(source, part)
    except OSError as error:
        raise DheadsError(f"cannot write {target}: {error.strerror}") from error


def prune(run: Path, step: int, keep: int) -> None:
    """Remove all numbered weights except the last `keep` up to `step`; later ones are from an earlier run."""
    found = {int(match[1]): path for path in run.iterdir() if (match := _NUMBERED.fullmatch(path.name))}
    kept = sorted(number for number in found if number <= step)[-keep:] if keep > 0 else []
    for number, path in found.items():
        if number not in kept:
            path.unlink(missing_ok=True)
