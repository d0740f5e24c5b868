"""The pages of the manual, and the commands and code in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import typer
from conftest import ROOT
from typer.main import get_command

from dheads.cli import app

RUN = ["README.md", "docs/cli.md", "docs/python.md"]  # every command and all Python code of these pages is run
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
ALL = ["README.md", "CHANGELOG.md", "examples/README.md", "recipes/README.md", *DOCS]
PROGRAM: Any = get_command(app)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """The commands of the shell blocks: one a line, but loops and continued lines are one command."""
    found: list[str] = []
    loops = 0
    for line in "".join(blocks(page, "sh")).splitlines():
        if loops or (found and found[-1].endswith("\\")):
            found.append(f"{found.pop()}\n{line}")
        elif line and not line.startswith("#"):
            found.append(line)
        loops += len(re.findall(r"\bdo\b", line)) - len(re.findall(r"\bdone\b", line))
    return found


def calls(command: str) -> list[list[str]]:
    """The arguments of every call of dheads in a shell command."""
    lexer = shlex.shlex(command.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = []
    inside = False
    for word in lexer:
        if set(word) <= set("();<>|&"):
            inside = False
        elif word == "dheads":
            inside = True
            found.append([])
        elif inside:
            found[-1].append(word)
    return found


def parsed(args: list[str]) -> dict[str, Any]:
    """What dheads' own parser makes of a call, by parameter; it exits where the call is wrong."""
    if args[0].startswith("-"):
        return {}
    try:
        with PROGRAM.commands[args[0]].make_context(f"dheads {args[0]}", args[1:]) as context:
            return dict(context.params)
    except typer.Exit:  # an option that prints something and ends the program
        return {}


def inputs(command: str) -> set[Path]:
    """The photos, sounds and videos that the calls of `dheads sample` in a command read."""
    found: set[Path] = set()
    for args in calls(command):
        if args[0] == "sample":
            given = parsed(args)
            found |= {given["face"], given["motion_from"], *(given["sounds"] or [])}
    return found
