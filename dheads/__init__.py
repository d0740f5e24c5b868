"""Diffused Heads: a photo and a voice recording in, a video of that person saying it out."""

import os

__version__ = "0.1.0"  # pyproject.toml reads it from here

# By default OpenMP's threads wait for each other in a loop that takes a core each, so that a program on a busy machine
# takes ten times as long. The variable is read when PyTorch is loaded; what the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
