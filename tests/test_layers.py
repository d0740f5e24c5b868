"""The package's layers: imports point down only, by package; and nothing grows too long to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT, program

house = program("docs/house.py")
LEVEL = {name: level for level, row in enumerate(house.ROWS) for name in row} | {"__init__": 99, "__main__": 99}
FILES = sorted((ROOT / "dheads").rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(ROOT / "dheads").with_suffix("").as_posix()


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_point_down(path: Path) -> None:
    own = named(path).split("/")[0]
    assert own in LEVEL, f"{path} has no place in the rows of docs/house.py"
    others = house.imported(path.read_text(encoding="utf-8")) - {own} - house.WITHIN_A_ROW.get(own, set())
    too_high = {name for name in others if LEVEL[name] >= LEVEL[own]}
    assert not too_high, f"{path} may not import {', '.join(sorted(too_high))}"


def test_the_parser_sees_every_form_of_import() -> None:
    source = "import dheads, dheads.cli\ndef f():\n    from dheads import model\n    from dheads.media.sound import x\n"
    assert house.imported(source + "import torch\nfrom dheads.errors import y") == {"cli", "model", "media", "errors"}


def test_the_picture_of_the_house_is_up_to_date() -> None:
    assert house.PAGE.read_text(encoding="utf-8") == house.page_with(house.picture()), "python docs/house.py --write"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_modules_and_functions_are_short(path: Path) -> None:
    """Up to 400 lines a module and 60 a function; a command's options are declarations, not code."""
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            begin = node.body[0].lineno if path.parent.name == "cli" else node.lineno
            assert (node.end_lineno or begin) - begin < 60, node.name


def test_the_root_is_small() -> None:
    assert len(list((ROOT / "dheads").glob("*.py"))) <= 12
