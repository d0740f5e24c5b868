"""The command line: parses, calls one verb, prints, sets the exit code. The only file that prints or exits.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 the user can mend it, 2 usage,
130 interrupted; anything else is a bug, with its traceback. The verbs are imported inside their commands, so that
`dheads --help` need not wait for torch.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import logging
import re
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from dheads import __version__
from dheads import config as configuration
from dheads.config import Config
from dheads.errors import DheadsError


class _Messages(logging.Handler):
    """Messages of the modules below, on stderr, beside the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        with contextlib.suppress(OSError):  # a log on a full disk ends no work
            tqdm.write(f"{prefix}{record.getMessage()}", file=sys.stderr)


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

_LISTED = 10  # clips left out that are named one by one

Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to compute.")]
ConfigFile = Annotated[Path | None, typer.Option(help="TOML file laid over the preset.", show_default=False)]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Laid over both: training.steps=1000.", show_default=False),
]
Weights = typer.Option(help="Name in weights.toml, or path of a checkpoint.")
AcceptLicense = Annotated[
    bool, typer.Option("--accept-license", help="Accept the licence of weights that ask for it; once is enough.")
]


def _be_quiet(wanted: bool) -> bool:
    messages = logging.getLogger("dheads")
    messages.handlers = [_Messages()]
    messages.setLevel(logging.CRITICAL if wanted else logging.INFO)
    return wanted


Quiet = Annotated[
    bool, typer.Option("--quiet", callback=_be_quiet, help="No progress, no messages; errors still show.")
]
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
    weights: Annotated[str, Weights] = "small",
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
    compiled: Annotated[
        bool, typer.Option("--compile", help="A minute of torch.compile first; for hours of video.")
    ] = False,
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a video of the person in FACE saying AUDIO."""
    from dheads import sample as verb

    _ask_consent(weights, accept_license)
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
        compiled=compiled,
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
    preset: Annotated[str, typer.Option(help="Configuration to start from.")] = "small",
    config: ConfigFile = None,
    changes: Changes = None,
    layout: Annotated[
        Literal["crema", "lrw", "released", "folder"] | None,
        typer.Option(help="How RAW is laid out.", show_default="found by looking"),
    ] = None,
    splits: Annotated[
        Path | None, typer.Option(help="CSV with the columns clip, speaker and split.", show_default=False)
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Only the I-th of N parts, for N machines.", show_default="all, or torchrun's"
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Clips to work on at once; 0: as the machine allows.")] = 0,
    device: Device = "auto",
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Turn the videos in RAW into a dataset of aligned faces and speech embeddings."""
    part = _parse_shard(shard)
    chosen = configuration.override(configuration.preset(preset), *_read_changes(config, changes))
    from dheads import prepare as verb
    from dheads.sample import resolve_device

    _ask_consent(chosen.conditioning.speech_encoder, accept_license)
    summary = verb.prepare(
        raw,
        out,
        chosen,
        layout=layout,
        split_file=splits,
        shard=part,
        workers=workers,
        device=str(resolve_device(device)),
        progress=not quiet,
    )
    if not quiet:
        _print_summary(summary)
    _print_result(summary, as_json)


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Dataset made by `dheads prepare`.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; one that was interrupted goes on.", show_default="DATA's name and -run"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Configuration to start from.", show_default="that of --init, else of the data")
    ] = None,
    config: ConfigFile = None,
    changes: Changes = None,
    init: Annotated[
        str | None, typer.Option(help="Weights to start from: name or path of a checkpoint.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what the run would cost.")] = False,
    device: Device = "auto",
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
) -> None:
    """Train a model; prints the path of its checkpoint. Under torchrun on several GPUs and machines."""
    if init is not None:
        _ask_consent(init, accept_license)
    from dheads.distributed import world

    main = world().is_main
    if not main:
        _be_quiet(True)
    laid_over = _read_changes(config, changes)
    chosen = configuration.override(_starting_point(preset, init, data), *laid_over)
    if main and dry_run:
        typer.echo(_costs(chosen, data, world().size))
    elif main and not quiet:
        typer.echo(f"{configuration.to_toml(chosen)}\n{_costs(chosen, data, world().size)}", err=True)
    if dry_run:
        return
    from dheads import train as verb
    from dheads.sample import resolve_device

    run = out or Path(f"{data.resolve().name}-run")
    place = str(resolve_device(device))
    path = verb.train(chosen, data, run, device=place, init=init, progress=main and not quiet)
    if main:
        typer.echo(path)


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


def _ask_consent(name: str, accepted: bool) -> None:
    """Weights under a licence of their own are used once it was accepted: by the flag, or at the terminal."""
    from dheads.weights import accept, consent

    text = consent(name)
    if text is None:
        return
    if not accepted and sys.stdin.isatty() and sys.stderr.isatty():
        typer.echo(text, err=True)
        accepted = typer.confirm("Do you accept it?", err=True)
    if accepted:
        accept(name)


def _starting_point(preset: str | None, init: str | None, data: Path) -> Config:
    """The preset; without one the configuration of the weights to start from; else the preset of the data."""
    if preset is not None:
        return configuration.preset(preset)
    if init is not None:
        from dheads.weights import load

        return load(init).config
    from dheads.data import Dataset

    return configuration.preset(str(Dataset(data).info.get("preset", "small")))


def _costs(chosen: Config, data: Path, processes: int) -> str:
    from dheads.data import Dataset
    from dheads.plan import plan

    return "\n".join(plan(chosen, len(Dataset(data).split("train")), processes).lines())


def _read_changes(file: Path | None, changes: list[str] | None) -> list[dict[str, Any]]:
    """What is laid over the preset, in order: the TOML file, then each --set."""
    return [*([_read_toml(file)] if file else []), *(_parse_change(change) for change in changes or [])]


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    """3/16 -> (3, 16)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter(f"{text!r} is not I/N, such as 3/16", param_hint="--shard")
    return int(match[1]), int(match[2])


def _print_result(result: Any, as_json: bool) -> None:
    """The path of what was made, or everything about it as one line of JSON."""
    typer.echo(json.dumps(dataclasses.asdict(result), default=str) if as_json else result.path)


def _print_summary(summary: Any) -> None:
    """What `prepare` did: a few clips that were left out by name, many by reason."""
    hours = f"{summary.seconds / 3600:.2f} hours, {summary.frames} frames"
    typer.echo(f"{summary.clips} clips, {hours}, {summary.speakers} speakers", err=True)
    if len(summary.failed) <= _LISTED:
        _print_failed(summary.failed)
    else:
        typer.echo(f"left out {len(summary.failed)} clips, which failed.csv names:", err=True)
        for reason, count in summary.drops.items():
            typer.echo(f"  {count} x {reason}", err=True)
    if summary.contact_sheet is not None:
        typer.echo(f"look at {summary.contact_sheet}", err=True)


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
