"""The `dheads` program: its commands, its version, and how errors and signals end it.

Exit codes: 0 done, 1 an error that the user can fix (one line on stderr), 2 usage, 130 interrupted, 143 terminated.
Anything else is a bug and ends with its traceback. The commands import what they call inside their functions, so that
`dheads --help` does not wait for torch.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dheads import __version__
from dheads.cli import evaluate, prepare, sample, train
from dheads.cli.help import Command
from dheads.cli.program import running


class _Program(TyperGroup):
    """The group of all commands."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command."""
        if "_DHEADS_COMPLETE" in os.environ:
            # Typer would load rich, which takes longer than all else, to remove its markup from help that has none.
            sys.modules["rich"] = None  # type: ignore[assignment]
        with running():
            return super().main(*args, **extra)


# Plain help and tracebacks: rich would double the time to start.
app = typer.Typer(
    cls=_Program,
    help="Make videos of a person speaking, from a photo and a recording.",
    epilog="`dheads COMMAND --help` lists the options of a command. Videos are marked as AI-generated in their "
    "metadata. Make videos only of people who agreed to it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
)
app.command("sample", cls=Command, epilog=sample.EXAMPLES)(sample.sample)
app.command("prepare", cls=Command, epilog=prepare.EXAMPLES)(prepare.prepare)
app.command("train", cls=Command, epilog=train.EXAMPLES)(train.train)
app.command("eval", cls=Command, epilog=evaluate.EXAMPLES)(evaluate.evaluate)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dheads {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The options of the program itself."""
