"""`dheads train`: a dataset to a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dheads import config as configurations
from dheads.cli.configuration import read_changes
from dheads.cli.help import CONFIGURATION, INPUT, OUTPUT
from dheads.cli.licences import ask_consent
from dheads.cli.options import AcceptLicense, ConfigFile, Device, Quiet, Settings, preset_names, weights_names
from dheads.cli.printing import configure_log, message
from dheads.config import PRESETS, Config, RunConfig

if TYPE_CHECKING:
    from dheads.training.plan import Plan

EXAMPLES = """\
dheads train --data data
dheads train --data data --init small --set run.minutes=60"""


def _print_preset(name: str | None) -> None:
    if name is not None:
        from dheads.config.presets import preset_text

        typer.echo(preset_text(name), nl=False)
        raise typer.Exit


def train(
    data: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Dataset written by `dheads prepare`.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ],
    init: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Weights to start from: small, crema or a checkpoint.",
            show_default="random weights",
            autocompletion=weights_names,
            rich_help_panel=INPUT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the run. An interrupted run in it continues.",
            show_default="the name of the dataset and -run",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print parameters, memory and epochs of the run, and exit.", rich_help_panel=OUTPUT
        ),
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Configuration to start from: {', '.join(PRESETS)}.",
            show_default="that of --init, else of the dataset",
            autocompletion=preset_names,
            rich_help_panel=CONFIGURATION,
        ),
    ] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    print_config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            callback=_print_preset,
            is_eager=True,
            help="Print that preset as a commented TOML file, and exit.",
            show_default=False,
            autocompletion=preset_names,
            rich_help_panel=CONFIGURATION,
        ),
    ] = None,
    device: Device = "auto",
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
) -> None:
    """Train a model on a dataset.

    For several GPUs or machines: torchrun -m dheads train ...
    """
    from dheads.system.distributed import world

    is_main = world().is_main
    configure_log(quiet or not is_main)
    if init is not None:
        ask_consent(init, accept_license)
    changes = read_changes(config, settings)
    chosen = configurations.override(_starting_point(preset, init, data), *changes)
    if dry_run:
        if is_main:
            typer.echo("\n".join(plan_of(chosen, data, world().size).lines()))
        return
    from dheads.system.devices import described, resolve_device
    from dheads.training.loop import train as train_model

    run, found = out or Path(f"{data.resolve().name}-run"), resolve_device(device)
    shown = is_main and not quiet
    if shown:
        message(f"train {run} {described(found)}: {plan_of(chosen, data, world().size).summary()}")
    path = train_model(chosen, data, run, device=str(found), init=init, progress=shown)
    if is_main:
        typer.echo(path)


def _starting_point(preset: str | None, init: str | None, data: Path) -> Config:
    """The preset; without one, the configuration of the weights to start from; without these, the dataset's preset."""
    if preset is not None:
        return configurations.preset(preset)
    if init is not None:
        from dheads.weights.checkpoints import load

        # The section run suits the machine on which the weights were trained.
        return replace(load(init).config, run=RunConfig())
    from dheads.dataset.dataset import Dataset

    return configurations.preset(str(Dataset(data).info.get("preset", "small")))


def plan_of(config: Config, data: Path, processes: int) -> Plan:
    """The size of a training run on the dataset."""
    from dheads.dataset.dataset import Dataset
    from dheads.training.plan import plan

    return plan(config, len(Dataset(data).split("train")), processes)
