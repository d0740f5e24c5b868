"""The command line: parses, calls one verb, prints, sets the exit code. The only file that prints or exits.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 the user can mend it, 2 usage,
130 interrupted; anything else is a bug, with its traceback. The verbs are imported inside their commands, so that
`dheads --help` need not wait for torch.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from dheads import __version__
from dheads import config as configuration
from dheads.config import Config
from dheads.errors import DheadsError


class _Group(TyperGroup):
    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DheadsError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error


# Plain help and tracebacks: rich would double the time to start.
app = typer.Typer(
    cls=_Group,
    help="A photo and a voice recording in, a video of that person saying it out.",
    epilog="Videos carry a note that they are AI-generated. Show only people who agreed to it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to compute.")]
Preset = Annotated[str, typer.Option(help="Configuration to start from.")]
ConfigFile = Annotated[Path | None, typer.Option(help="TOML file laid over the preset.", show_default=False)]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Laid over both: training.steps=1000.", show_default=False),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no messages; errors still show.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dheads {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def sample(
    face: Annotated[Path, typer.Argument(metavar="FACE", help="Photo of a face.", show_default=False)],
    audio: Annotated[Path, typer.Argument(metavar="AUDIO", help="Speech, or a video with it.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="MP4 to write.", show_default=False)],
    weights: Annotated[str, typer.Option(help="Name of packaged weights, or the path of a checkpoint.")] = "small",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps a frame.", show_default="the weights' own")
    ] = None,
    solver: Annotated[
        Literal["ddpm", "ddim", "dpm++2m"] | None,
        typer.Option(help="How to denoise.", show_default="the weights' own"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same video.")] = 0,
    device: Device = "auto",
    size: Annotated[
        int | None,
        typer.Option(min=16, max=4096, help="Side of the video in px.", show_default="the weights' own"),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a video of the person in FACE saying AUDIO."""
    from dheads import sample as verb

    result = verb.sample(
        face,
        audio,
        output,
        weights=weights,
        steps=steps,
        solver=solver,
        seed=seed,
        device=device,
        size=size,
        progress=not quiet,
    )
    if not quiet:
        for note in result.notes:
            typer.echo(note, err=True)
    _print_result(result, as_json)


@app.command()
def prepare(
    raw: Annotated[
        Path, typer.Argument(metavar="RAW", help="Folder of videos and photos of speaking people.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the dataset to write.", show_default=False)],
    preset: Preset = "small",
    config: ConfigFile = None,
    changes: Changes = None,
    splits: Annotated[
        Path | None, typer.Option(help="CSV with the columns clip, speaker and split.", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Videos to work on at once; 0: one a CPU core.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Turn the videos in RAW into a dataset of aligned faces and speech embeddings."""
    chosen = _configure(preset, config, changes)
    from dheads import prepare as verb

    summary = verb.prepare(raw, out, chosen, split_file=splits, workers=workers, progress=not quiet)
    if not quiet:
        typer.echo(f"{summary.clips} clips, {summary.frames} frames, {summary.speakers} speakers", err=True)
        _print_failed(summary.failed)
    _print_result(summary, as_json, path=out)


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Dataset made by `dheads prepare`.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the run; one that was interrupted goes on.", show_default=False)],
    preset: Preset = "small",
    config: ConfigFile = None,
    changes: Changes = None,
    init: Annotated[Path | None, typer.Option(help="Checkpoint to start from.", show_default=False)] = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a model; prints the path of its checkpoint."""
    chosen = _configure(preset, config, changes)
    from dheads import train as verb
    from dheads.sample import resolve_device

    place = str(resolve_device(device))
    typer.echo(verb.train(chosen, data, out, device=place, init=init, progress=not quiet))


@app.command("eval")
def evaluate(
    generated: Annotated[
        Path, typer.Argument(metavar="GENERATED", help="Video, or folder of them.", show_default=False)
    ],
    reference: Annotated[Path, typer.Option(help="The real ones, of the same names.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="CSV to write, a row a video.", show_default=False)] = None,
    size: Annotated[
        int | None,
        typer.Option(min=16, help="Side in px at which they were generated, where enlarged since.", show_default=False),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure generated videos against real ones of the same names."""
    from dheads import evaluate as verb

    report = verb.evaluate(generated, reference, size=size, progress=not quiet)
    if not quiet:
        _print_failed(report.failed)
    if out is not None:
        _write_csv(out, report.per_clip)
    if as_json:
        _print_result(report, as_json)
    else:
        for name, value in report.summary.items():
            typer.echo(f"{name}\t{value:.4g}" if isinstance(value, float) else f"{name}\t{value}")


def _configure(preset: str, file: Path | None, changes: list[str] | None) -> Config:
    """Preset < TOML file < --set."""
    chosen = configuration.preset(preset)
    if file is not None:
        chosen = configuration.override(chosen, _read_toml(file))
    for change in changes or []:
        chosen = configuration.override(chosen, _parse_change(change))
    return chosen


def _print_result(result: Any, as_json: bool, path: Path | None = None) -> None:
    """The path of what was made, or everything about it as one line of JSON."""
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result), default=str))
    else:
        typer.echo(path or result.path)


def _print_failed(failed: list[tuple[str, str]]) -> None:
    for name, reason in failed:
        typer.echo(f"left out {name}: {reason}", err=True)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DheadsError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DheadsError(f"{path} is not a TOML file: {error}") from error


def _parse_change(text: str) -> dict[str, Any]:
    """Turn training.steps=1000 into {"training": {"steps": 1000}}; what is no TOML value is a string."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--set")
    try:
        nested = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        nested = value.strip()
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return nested


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise DheadsError(f"cannot write {path}: {error.strerror}") from error
