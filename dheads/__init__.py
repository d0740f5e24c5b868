"""Diffused Heads: a photo and a voice recording in, a video of that person saying it out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dheads.sampling.talker import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"  # pyproject.toml reads it from here

# OpenMP's threads wait for each other in a loop that takes a core each. GNU's library lets it run for milliseconds
# before a thread sleeps: on a busy machine a program then takes ten times as long. Without the loop it takes 1.4 times
# as long on an idle machine. 2,000 rounds, some microseconds, are a compromise; libraries that do not know
# GOMP_SPINCOUNT sleep at once. Both variables are read when PyTorch is loaded. What the user has set stays.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}


def __getattr__(name: str) -> object:
    """`load` comes with PyTorch, which takes seconds to import: it is imported when it is first asked for."""
    if name == "load":
        from dheads.sampling.talker import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
