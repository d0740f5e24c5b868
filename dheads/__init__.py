"""Diffused Heads: a photo and a voice recording in, a video of that person saying it out."""

__version__ = "0.1.0"  # pyproject.toml reads it from here
