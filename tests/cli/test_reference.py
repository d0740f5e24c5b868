"""The tables of the manual against the code: options of the commands, and arguments of the Python interface."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable

import manual
import pytest

import dheads
from dheads.sampling.jobs import COLUMNS, MAX_GUIDANCE, MAX_MOTION, SIZES
from dheads.sampling.talker import Result, Talker

COMMON = "## Options of several commands"


def section(page: str, heading: str) -> str:
    """What stands below a heading, up to the next of its level."""
    level = heading.split()[0]
    _, _, rest = f"\n{manual.text(page)}".partition(f"\n{heading}\n")
    assert rest, f"{page} has no heading {heading}"
    return re.split(rf"^{level} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, without the lines of dashes."""
    lines = [line for line in text.splitlines() if line.startswith("| ") or line.startswith("|-")]
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if not row[0].startswith("--")]


def options(text: str) -> set[str]:
    """The options that the first column of the tables names."""
    return {option for row in rows(text) for option in re.findall(r"`(--[a-z-]+)", row[0])}


@pytest.mark.parametrize("command", manual.PROGRAM.commands)
def test_all_options_are_in_the_manual(command: str) -> None:
    real = {max(p.opts, key=len) for p in manual.PROGRAM.commands[command].params if p.opts[0].startswith("-")}
    # The parser adds --help, which is no parameter of the command.
    common = {name for row in rows(section("docs/cli.md", COMMON)) for name in options("| " + row[0] + " |")}
    own = options(section("docs/cli.md", f"## dheads {command}"))
    assert own - real == set(), "the page names options that do not exist"
    assert real - own - common == set(), "the page lacks options"
    for name, commands, _ in rows(section("docs/cli.md", COMMON))[1:]:
        if commands == "all" or command != "train":
            assert options(f"| {name} |") <= real | {"--help"}


def test_all_columns_of_a_list_are_in_the_manual() -> None:
    named = re.findall(r"`(\w+)`", "\n".join(row[0] for row in rows(section("docs/cli.md", "### Many videos"))))
    assert {"face", "audio", "output", *named} == set(COLUMNS)


# --- Python


def arguments(function: Callable[..., object]) -> list[tuple[str, str, str]]:
    """(name, type, default) of the parameters, as the page writes them."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    return [(p.name, p.annotation, "" if p.default is p.empty else repr(p.default)) for p in parameters]


def table(heading: str) -> list[tuple[str, ...]]:
    """The first columns of a section's table, without the meaning."""
    found = rows(section("docs/python.md", heading))[1:]
    return [tuple(cell.strip("`") for cell in row[:-1]) for row in found]


def test_arguments() -> None:
    both = "## Arguments of `sample` and `frames`"
    assert table("## `dheads.load`") == arguments(dheads.load)
    assert table(both) == arguments(Talker.sample)
    of_files = ("output", "audio_codec", "on_frame")
    assert [row for row in table(both) if row[0] not in of_files] == arguments(Talker.frames)
    assert table("## `Result`") == [(field.name, field.type) for field in dataclasses.fields(Result)]


@pytest.mark.parametrize("function", [dheads.load, Talker.sample, Talker.frames])
def test_signatures(function: Callable[..., object]) -> None:
    """The block shows the signature, the keyword arguments of a long one as `...`, and the type that is returned."""
    short = function.__qualname__ if "." in function.__qualname__ else f"dheads.{function.__name__}"
    (shown,) = re.findall(r"^```py\n(.*?)\n```", section("docs/python.md", f"## `{short}`"), re.MULTILINE | re.DOTALL)
    real = function.__name__ + str(inspect.signature(function)).replace("self, ", "").replace("'", "")
    begin, _, end = shown.replace("'", "").partition("...")
    assert real.startswith(begin)
    assert real.endswith(end)


def test_the_docstring_names_all_arguments() -> None:
    named = set(re.findall(r"\w+", inspect.getdoc(Talker.sample) or ""))
    assert {name for name, _, _ in arguments(Talker.sample)} <= named


def test_exports_and_limits() -> None:
    page = manual.text("docs/python.md")
    assert all(f"`{name}`" in page for name in dheads.__all__)
    (size,) = (row for row in rows(page) if row[0] == "`size`")
    (guidance,) = (row for row in rows(page) if row[0] == "`guidance`")
    (motion,) = (row for row in rows(page) if row[0] == "`motion`")
    assert f"{SIZES[0]} to {SIZES[1]}" in size[-1]
    assert f"0 to {MAX_GUIDANCE}" in guidance[-1]
    assert f"0 to {MAX_MOTION}" in motion[-1]
