"""Help as plain text: options in groups, and examples at the end.

Typer shows the groups (rich_help_panel) only where rich draws the help, which takes twice the time to start and leaves
a third of an 80-column terminal for the text.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

INPUT, OUTPUT, LOOK, MOTION, SPEED = "Input", "Output", "Look", "Motion", "Speed"
MANY, CONFIGURATION, GENERATION, MEASURES, TURING = (
    "Many videos",
    "Configuration",
    "Generation, with --weights",
    "Measures",
    "Turing test",
)
_OTHER = "Other options"
_WIDEST = 30  # columns; the text of a longer name begins on the next line


class Command(TyperCommand):
    """A command whose options are grouped by `rich_help_panel`, and whose epilog has one example a line.

    Typer's own types of a context and a formatter are private.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                name, text = record
                if param.param_type_name == "argument":
                    name = name.partition(" ")[0]  # without Python's name of its type
                groups.setdefault(getattr(param, "rich_help_panel", None) or _OTHER, []).append((name, text))
        width = min(max(len(name) for rows in groups.values() for name, _ in rows), _WIDEST)
        for group, rows in groups.items():
            with formatter.section(group):
                formatter.write_dl([(name.ljust(width), text) for name, text in rows], col_max=_WIDEST)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Examples"):
            for example in (self.epilog or "").splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")
