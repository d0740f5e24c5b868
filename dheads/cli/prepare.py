"""`dheads prepare`: raw videos and photos to a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dheads import config as configurations
from dheads.cli.configuration import read_changes
from dheads.cli.licences import ask_consent
from dheads.cli.options import (
    AcceptLicense,
    ConfigFile,
    Device,
    Json,
    Preset,
    Quiet,
    Settings,
    ShardOption,
    parse_shard,
)
from dheads.cli.printing import message, print_failed, print_result

if TYPE_CHECKING:
    from dheads.dataset.prepare import Summary

_MAX_LISTED = 10  # failed clips printed one by one


def prepare(
    raw: Annotated[
        Path, typer.Argument(metavar="RAW", help="Folder of videos and photos of speaking people.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the dataset to.", show_default=False)],
    preset: Preset = "small",
    config: ConfigFile = None,
    settings: Settings = None,
    layout: Annotated[
        Literal["crema", "lrw", "released", "folder"] | None,
        typer.Option(help="Layout of the folder RAW.", show_default="detected"),
    ] = None,
    splits: Annotated[
        Path | None,
        typer.Option(help="CSV file with the columns clip, speaker and split, one row per clip.", show_default=False),
    ] = None,
    shard: ShardOption = None,
    workers: Annotated[
        int,
        typer.Option(min=0, help="Number of clips to process at once; 0: as many as suit the cores and GPUs."),
    ] = 0,
    device: Device = "auto",
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert the videos and photos in RAW to a dataset of aligned faces and speech embeddings."""
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
