"""Diffused Heads: a photo and a voice recording in, a video of that person saying it out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dheads.errors import DheadsError

if TYPE_CHECKING:
    from dheads.sampling.talker import Talker

__all__ = ["DheadsError", "__version__", "load"]
__version__ = "0.2.0.dev0"  # pyproject.toml reads it from here

# OpenMP's threads wait for each other in a loop that takes a core each. GNU's library lets it run for milliseconds
# before a thread sleeps: on a busy machine a program then takes ten times as long. Without the loop it takes 1.4 times
# as long on an idle machine. 2,000 rounds, some microseconds, are a compromise; libraries that do not know
# GOMP_SPINCOUNT sleep at once. Both variables are read when PyTorch is loaded. What the user has set stays.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}


def load(weights: str = "small", device: str = "auto", progress: bool = True) -> Talker:
    """Weights of a known name or a checkpoint file, ready to make videos: `dheads.load().sample(face, audio, output)`.

    device: auto (CUDA, else MPS, else the CPU), cpu, cuda or mps. progress: bars on stderr.
    Raises DheadsError for weights that cannot be used, and for a device that is not there.
    """
    from dheads.sampling import talker  # takes seconds: PyTorch

    return talker.load(weights, device, progress)
