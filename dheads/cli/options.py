"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from dheads.cli.printing import configure_log
from dheads.sampling.jobs import MAX_SEED

Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"],
    typer.Option(help="Device to compute on; auto: CUDA or MPS where available, else the CPU."),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Denoising steps per frame; the time per frame grows with them.",
        show_default="the weights' recommendation",
    ),
]
Solver = Annotated[
    Literal["ddpm", "ddim", "dpm++2m"] | None,
    typer.Option(help="Sampling algorithm.", show_default="the weights' recommendation"),
]
Seed = Annotated[
    int,
    typer.Option(min=0, max=MAX_SEED, help="Random seed; the same seed on the same device gives the same video."),
]
Preset = Annotated[str, typer.Option(help="Preset configuration to start from.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(help="TOML file with values that replace those of the preset.", show_default=False),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One value that replaces that of the preset and of --config, such as sampling.steps=50; repeatable.",
        show_default=False,
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Process only the I-th of N parts, to share the work among N machines.",
        show_default="everything; under torchrun the process's own part",
    ),
]
AcceptLicense = Annotated[
    bool,
    typer.Option("--accept-license", help="Accept the licence of weights that require it; needed once."),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", callback=configure_log, help="Print no progress and no messages, only errors.")
]
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
