"""`dheads train`: a dataset to a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dheads import config as configurations
from dheads.cli.configuration import read_changes
from dheads.cli.licences import ask_consent
from dheads.cli.options import AcceptLicense, ConfigFile, Device, Quiet, Settings
from dheads.cli.printing import configure_log
from dheads.config import Config, RunConfig


def _print_preset(name: str | None) -> None:
    if name is not None:
        from dheads.config.presets import preset_text

        typer.echo(preset_text(name), nl=False)
        raise typer.Exit


def train(
    data: Annotated[Path, typer.Option(help="Dataset written by `dheads prepare`.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; an interrupted run in it continues.", show_default="the name of DATA and -run"
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Preset configuration to start from.",
            show_default="the configuration of --init, else the preset of the dataset",
        ),
    ] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Weights to start from: a name in weights.toml, or the path of a checkpoint.",
            show_default="random weights",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the size of the run (parameters, FLOPs, memory, epochs), and exit.")
    ] = False,
    print_config: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET",
            callback=_print_preset,
            is_eager=True,
            help="Print that preset as a commented TOML file for --config, and exit; needs no --data.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    accept_license: AcceptLicense = False,
    quiet: Quiet = False,
) -> None:
    """Train a model and print the path of its checkpoint. Run it by torchrun for several GPUs or machines."""
    if init is not None:
        ask_consent(init, accept_license)
    from dheads.system.distributed import world

    is_main = world().is_main
    if not is_main:
        configure_log(quiet=True)
    changes = read_changes(config, settings)
    chosen = configurations.override(_starting_point(preset, init, data), *changes)
    if is_main and dry_run:
        typer.echo(costs(chosen, data, world().size))
    elif is_main and not quiet:
        typer.echo(f"{configurations.to_toml(chosen)}\n{costs(chosen, data, world().size)}", err=True)
    if dry_run:
        return
    from dheads.system.devices import resolve_device
    from dheads.training.loop import train as train_model

    run = out or Path(f"{data.resolve().name}-run")
    path = train_model(chosen, data, run, device=str(resolve_device(device)), init=init, progress=is_main and not quiet)
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


def costs(config: Config, data: Path, processes: int) -> str:
    """The size of a training run on the dataset, one figure per line."""
    from dheads.dataset.dataset import Dataset
    from dheads.training.plan import plan

    return "\n".join(plan(config, len(Dataset(data).split("train")), processes).lines())
