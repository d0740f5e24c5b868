"""The package's layers: imports point down only, by package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# From the lowest to the highest; those of one row do not import one another, but for `model`, which is made of parts.
ROWS = [
    ["errors", "diffusion"],
    ["config", "losses", "system"],
    ["conditioning", "media"],
    ["extensions"],
    ["model", "faces"],
    ["denoiser"],
    ["weights"],
    ["speech"],
    ["dataset", "sampling"],
    ["training", "evaluation"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}


def place(path: Path) -> str:
    """The package that a file of dheads/ belongs to, or the file's own name where it lies at the root."""
    return path.relative_to(ROOT / "dheads").parts[0].removesuffix(".py")


def imported(source: str) -> set[str]:
    """The packages and root modules that a source file imports, at the top or inside a function."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    own = (name.split(".")[1] for name in names if name.startswith("dheads."))
    return {name for name in own if name in LEVEL}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "dheads").rglob("*.py")), ids=lambda path: f"{path.parent.name}.{path.stem}"
)
def test_imports_point_down(path: Path) -> None:
    own = place(path)
    if own == "__init__":
        return
    assert own in LEVEL, f"{path} has no place in the table of layers"
    too_high = {name for name in imported(path.read_text(encoding="utf-8")) - {own} if LEVEL[name] >= LEVEL[own]}
    assert not too_high, f"{path} may not import {', '.join(sorted(too_high))}"


def test_the_parser_sees_every_form_of_import() -> None:
    source = "import dheads, dheads.cli\ndef f():\n    from dheads import model\n    from dheads.media.sound import x\n"
    assert imported(source + "import torch\nfrom dheads.errors import y") == {"cli", "model", "media", "errors"}
