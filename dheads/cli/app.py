"""The `dheads` program: its commands, its version, and how errors and signals end it.

Exit codes: 0 done, 1 an error that the user can fix (one line on stderr), 2 usage, 130 interrupted, 143 terminated.
Anything else is a bug and ends with its traceback. The commands import what they call inside their functions, so that
`dheads --help` does not wait for torch.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dheads import __version__
from dheads.cli.evaluate import evaluate
from dheads.cli.prepare import prepare
from dheads.cli.program import running
from dheads.cli.sample import sample
from dheads.cli.train import train


class _Program(TyperGroup):
    """The group of all commands."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command."""
        with running():
            return super().main(*args, **extra)


# Plain help and tracebacks: rich would double the time to start.
app = typer.Typer(
    cls=_Program,
    help="Generate a video of a person speaking, from a photo and a speech recording.",
    epilog="Videos are marked as AI-generated in their metadata. Generate videos only of people who agreed to it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("sample")(sample)
app.command("prepare")(prepare)
app.command("train")(train)
app.command("eval")(evaluate)


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
