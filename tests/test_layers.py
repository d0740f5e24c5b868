"""The package's layers: imports point down only, as the table says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

BASE = {"errors", "ending", "files", "config"}
VERBS = {"prepare", "train", "sample", "evaluate"}
# Every module stands below those that may import it.
LIBRARY: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "ending": set(),
    "files": {"ending"},
    "startup": {"errors"},
    "config": {"errors"},
    "conditioning": {"config"},
    "lips": {"config", "conditioning"},
    "blinks": {"config", "conditioning"},
    "pauses": set(),
    "model": {"config", "conditioning", "lips"},
    "diffusion": set(),
    "losses": {"diffusion"},
    "denoiser": {"config", "conditioning", "model", "diffusion"},
    "engine": {"config", "conditioning", "model", "diffusion", "denoiser"},
    "media": {"errors", "files"},
    "hearing": BASE | {"media"},
    "soundtrack": BASE | {"hearing", "media"},
    "colours": set(),
    "photos": BASE | {"colours"},
    "video": BASE | {"media", "colours", "photos", "soundtrack"},  # animated pictures are photos' files
    "jpeg": set(),
    "augment": {"jpeg"},
    "faces": BASE,
    "detection": BASE | {"faces"},
    "mesh": BASE | {"faces", "detection"},
    "fan": BASE | {"faces", "detection"},
    "landmarks": BASE | {"faces", "detection", "mesh", "fan"},
    "eyes": BASE | {"faces", "detection", "mesh"},
    "paste": BASE | {"faces"},
    "screening": BASE | {"faces"},
    "released": BASE | {"model"},
    "locks": {"ending"},
    "downloads": BASE | {"locks"},
    "weights": BASE | {"downloads", "model", "released"},
    "audio": BASE | {"hearing", "media", "weights", "released"},  # encoders that are downloaded
    "lockstep": {"blinks", "conditioning", "engine", "errors", "pauses", "video"},
    "manifest": BASE,
    "splits": set(),
    "layouts": BASE | {"photos", "splits", "video"},  # the endings of their files
    "extraction": BASE | {"audio", "faces", "eyes", "landmarks", "layouts", "photos", "screening", "video"},
    "workers": {"errors", "ending", "startup"},
    "data": BASE | {"blinks", "colours", "faces", "lips", "manifest", "video"},
    "prefetch": set(),
    "clips": BASE | {"blinks", "conditioning", "data", "prefetch"},
    "draws": BASE | {"augment", "clips", "conditioning", "data", "prefetch", "video"},
    "distributed": BASE,
    "objective": {"config", "conditioning", "augment", "model", "diffusion", "losses", "denoiser", "draws"},
    "rollout": {"config", "conditioning", "model", "engine", "draws"},
    "parts": {"files"},
    "state": BASE | {"model", "parts"},
    "journal": BASE,
    "plan": BASE | {"model", "conditioning"},
    "measures": BASE | {"faces"},
    "flow": set(),
    "syncnet": BASE | {"faces", "weights"},
    "frechet": BASE | {"released", "video", "weights"},
    "recognition": BASE | {"faces", "weights"},
    "lipreading": {"errors", "ending"},
    "footage": BASE | {"faces", "landmarks", "video"},
    "comparison": BASE | {"faces", "eyes", "flow", "footage", "measures"},
    "watching": BASE | {"comparison", "footage", "landmarks", "media", "workers"},
    "instruments": BASE | {"audio", "comparison", "frechet", "lipreading", "recognition", "syncnet", "weights"},
    "remake": BASE | {"audio", "data", "engine", "lockstep", "manifest", "video"},
    "jobs": BASE,
    "playback": BASE | {"audio", "media", "video"},
    "catalogue": set(),
    "report": BASE | {"catalogue", "playback"},
    "turing": BASE | {"playback"},
}
MAY_IMPORT: dict[str, set[str]] = {
    **LIBRARY,
    "prepare": set(LIBRARY),
    "sample": set(LIBRARY),
    "train": set(LIBRARY) | {"sample"},  # its sample videos
    "evaluate": set(LIBRARY) | {"sample"},  # the devices, and what options change
    "cli": set(LIBRARY) | VERBS,
    "__main__": {"cli"},
}


def imported(source: str) -> set[str]:
    """The package's own modules that a source file imports, at the top or inside a function."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = "dheads" + (f".{node.module}" if node.module else "") if node.level else node.module or ""
            names += [f"{origin}.{alias.name}" for alias in node.names]
    own = (name.split(".")[1] for name in names if name.startswith("dheads."))
    return {module for module in own if module in MAY_IMPORT}


@pytest.mark.parametrize("path", sorted((ROOT / "dheads").rglob("*.py")), ids=lambda path: path.stem)
def test_imports_point_down(path: Path) -> None:
    assert path.stem in MAY_IMPORT, f"{path.name} has no place in the table of layers"
    too_high = imported(path.read_text(encoding="utf-8")) - MAY_IMPORT[path.stem]
    assert not too_high, f"{path.name} may not import {', '.join(sorted(too_high))}"


def test_the_table_itself_points_down() -> None:
    modules = list(MAY_IMPORT)
    for level, module in enumerate(modules):
        assert MAY_IMPORT[module] <= set(modules[:level]), module


def test_the_parser_sees_every_form_of_import() -> None:
    source = (
        "import dheads, dheads.cli\nfrom . import train\nfrom .data import x\ndef f():\n    from dheads import sample\n"
    )
    assert imported(source + "import torch\nfrom dheads.errors import y") == {
        "cli",
        "train",
        "data",
        "sample",
        "errors",
    }
