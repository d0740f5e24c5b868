"""`dheads prepare`: raw videos and photos to a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dheads import config as configurations
from dheads.cli.configuration import read_changes
from dheads.cli.help import INPUT, OUTPUT, SPEED
from dheads.cli.licences import ask_consent
from dheads.cli.options import AcceptLicense, ConfigFile, Device, Json, Preset, Quiet, Settings, parse_shard
from dheads.cli.printing import configure_log, message, print_failed, print_result

if TYPE_CHECKING:
    from dheads.dataset.prepare import Summary

EXAMPLES = """\
dheads prepare raw --out data
dheads prepare raw --out data --splits splits.csv"""
_MAX_LISTED = 10  # failed clips printed one by one


def prepare(
    raw: Annotated[
        Path,
        typer.Argument(
            metavar="RAW",
            help="Folder of videos and photos of speaking people.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Dataset to write.", show_default=False, rich_help_panel=OUTPUT),
    ],
    layout: Annotated[
        Literal["crema", "lrw", "released", "folder"] | None,
        typer.Option(help="How the files in RAW are arranged.", show_default="detected", rich_help_panel=INPUT),
    ] = None,
    splits: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV file with one clip per row: columns clip, speaker and split.",
            show_default="by speaker",
            rich_help_panel=INPUT,
        ),
    ] = None,
    preset: Preset = "small",
    config: ConfigFile = None,
    settings: Settings = None,
    device: Device = "auto",
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Clips to process at once; 0 suits the cores and GPUs.",
            rich_help_panel=SPEED,
        ),
    ] = 0,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Prepare only the I-th of N parts, to share the work among N machines.",
            show_default="all; under torchrun the process's own part",
            rich_help_panel=SPEED,
        ),
    ] = None,
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a dataset of the videos and photos in RAW."""
    configure_log(quiet, as_json)
    part = parse_shard(shard)
    chosen = configurations.override(configurations.preset(preset), *read_changes(config, settings))
    from dheads.dataset.prepare import prepare as prepare_dataset
    from dheads.system.devices import resolve_device

    ask_consent(chosen.conditioning.speech_encoder, accept_license)
    summary = prepare_dataset(
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
    print_result(summary, as_json)


def _print_summary(summary: Summary) -> None:
    """Print the dataset's size and what was left out: up to `_MAX_LISTED` clips by name, more by reason."""
    hours = f"{summary.seconds / 3600:.2f} hours, {summary.frames} frames"
    message(f"{summary.clips} clips, {hours}, {summary.speakers} speakers")
    if len(summary.failed) <= _MAX_LISTED:
        print_failed(summary.failed)
    else:
        message(f"left out {len(summary.failed)} clips, which failed.csv names:")
        for reason, count in summary.drops.items():
            message(f"  {count} x {reason}")
    if summary.passed_over:
        others = ", ".join(f"{count} x {kind}" for kind, count in summary.passed_over.items())
        message(f"passed over: {others}")
    if summary.contact_sheet is not None:
        message(f"look at {summary.contact_sheet}")
