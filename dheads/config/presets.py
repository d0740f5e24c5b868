"""The presets: TOML files in dheads/presets/, which a user can copy and change."""

from __future__ import annotations

import tomllib
from importlib import resources

from dheads.config.build import Config, from_dict
from dheads.errors import DheadsError

PRESETS = ("crema", "lrw", "small", "tiny")


def preset(name: str) -> Config:
    """The configuration of that name. Raises DheadsError, listing the known ones."""
    return from_dict({"name": name, **tomllib.loads(preset_text(name))})


def preset_text(name: str) -> str:
    """The TOML file of that preset, with its comments. Raises DheadsError, listing the known ones."""
    if name not in PRESETS:
        raise DheadsError(f"unknown preset {name!r}; the known ones are {', '.join(PRESETS)}")
    return resources.files("dheads").joinpath("presets", f"{name}.toml").read_text(encoding="utf-8")
