"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from dheads.cli.help import CONFIGURATION, SPEED
from dheads.config.presets import PRESETS


def preset_names(incomplete: str) -> list[str]:
    """Presets, for the completion of a command line."""
    return [name for name in PRESETS if name.startswith(incomplete)]


def weights_names(incomplete: str) -> list[str]:
    """Known weights that make videos, for the completion of a command line."""
    from dheads.weights.listing import known

    models = (name for name, entry in known().items() if entry["kind"] in ("model", "released"))
    return [name for name in models if name.startswith(incomplete)]


Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"],
    typer.Option(help="Device to compute on; auto takes a GPU if there is one.", rich_help_panel=SPEED),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Denoising steps per frame. The time grows with them.",
        show_default="as the weights recommend",
        rich_help_panel=SPEED,
    ),
]
Solver = Annotated[
    Literal["ddpm", "ddim", "dpm++2m"] | None,
    typer.Option(help="Sampling algorithm.", show_default="as the weights recommend", rich_help_panel=SPEED),
]
Preset = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"Configuration to start from: {', '.join(PRESETS)}.",
        autocompletion=preset_names,
        rich_help_panel=CONFIGURATION,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="TOML file whose values replace those of the preset.",
        show_default=False,
        rich_help_panel=CONFIGURATION,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Value that replaces one of the configuration, such as sampling.steps=50. Repeatable.",
        show_default=False,
        rich_help_panel=CONFIGURATION,
    ),
]
AcceptLicense = Annotated[
    bool,
    typer.Option("--accept-license", help="Accept the licence of weights that ask for it. Needed once."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors and results only.")]
Json = Annotated[bool, typer.Option("--json", help="Print each result as one line of JSON.")]


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """3/16 -> (3, 16). Raises typer.BadParameter."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter(f"{text!r} is not I/N, such as 3/16", param_hint="--shard")
    return int(match[1]), int(match[2])


def finite(value: float | None, option: str) -> float | None:
    """The value. Raises typer.BadParameter for infinity and NaN, which Typer's ranges let through."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number", param_hint=option)
    return value
