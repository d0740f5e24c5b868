"""The cost of fewer steps: the yardstick's measures by solver, spacing and number of steps.

    python benchmarks/steps.py --weights small --data prepared --out steps.jsonl
    python benchmarks/steps.py --weights small --data prepared --out steps.jsonl --solver dpm++2m --warm 4

Every held-out clip is generated from its own sound, all in lock-step; a row has the means over clips. A row is appended
to --out as soon as it is complete, and existing rows are not computed again, so the sweep can be interrupted. The
printed table is that of docs/log/speed.md.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm import tqdm
from yardstick import Take, measure, read_takes, read_truth

from dheads.config import Config, override
from dheads.dataset.dataset import Dataset
from dheads.evaluation.scoring import mean_values
from dheads.extensions.network import ExtendedUNet
from dheads.faces.landmarks import load_backend
from dheads.sampling.engine import Engine
from dheads.sampling.lockstep import VideoSpec, in_lockstep
from dheads.system.devices import resolve_device
from dheads.weights.checkpoints import load_model

SOLVERS = ["dpm++2m", "ddim", "ddpm"]
SPACINGS = ["uniform", "quadratic", "logsnr"]
STEPS = [2, 3, 4, 6, 8, 12, 25, 50, 100, 200]
COLUMNS = {
    "mouth_correlation": "correlation of the mouth's opening",
    "mouth_range_ratio": "range",
    "mouth_sharpness": "mouth sharpness",
    "identity_shape": "shape",
    "network_calls": "network calls a frame",
}


def main(
    data: Annotated[Path, typer.Option(help="Dataset made by `dheads prepare`.")],
    out: Annotated[Path, typer.Option(help="File of rows, one line of JSON each; an existing one is continued.")],
    weights: Annotated[str, typer.Option(help="Name of packaged weights, or a checkpoint.")] = "small",
    solver: Annotated[list[str] | None, typer.Option(help="Only this one; can be repeated.")] = None,
    spacing: Annotated[list[str] | None, typer.Option(help="Only this one; can be repeated.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Only this number; can be repeated.")] = None,
    warm: Annotated[
        list[int] | None, typer.Option(help="Start from the last frame, with so many steps; 0: do not.")
    ] = None,
    guidance: Annotated[list[float] | None, typer.Option(help="Guidance scale; 1: none.")] = None,
    split: str = "val",
    frames: Annotated[int, typer.Option(help="Frames of each clip.")] = 40,
    device: str = "auto",
) -> None:
    """Measure quality by number of steps."""
    unet, config, _ = load_model(weights, resolve_device(device))
    dataset = Dataset(data)
    dataset.check(config)
    takes = read_takes(dataset, config, split, None, frames)
    swept = itertools.product(solver or SOLVERS, spacing or SPACINGS, warm or [0], guidance or [1.0], steps or STEPS)
    for kind, lie, start, guide, count in tqdm(list(swept), desc="sweep", unit="setting"):
        setting = {"solver": kind, "spacing": lie, "warm_steps": start, "guidance": guide, "steps": count}
        is_known = any(setting.items() <= row["sampling"].items() for row in read_rows(out))
        if not is_known and start < count:
            sampling = {"solver": kind, "spacing": lie, "steps": count}
            extensions = {"noise": {"warm_steps": start}, "sound": {"guidance": guide}}
            changed = override(config, {"sampling": sampling, "extensions": extensions})
            row = {"sampling": setting, **figures(unet, changed, takes)}
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print(table(read_rows(out)))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def figures(unet: ExtendedUNet, config: Config, takes: list[Take]) -> dict[str, float]:
    """The means over all people of the measures of `dheads eval`."""
    videos: list[list[np.ndarray]] = [[] for _ in takes]
    specs = [VideoSpec(take.photo, take.speech) for take in takes]
    total = sum(len(take.speech) for take in takes)
    made = in_lockstep(Engine(unet, config), specs, len(specs))
    for index, frame, _ in tqdm(made, total=total, unit="frame", leave=False):
        videos[index].append(frame)
    backend = load_backend("mesh")
    rows = [
        measure(np.stack(video), read_truth(take, [], backend), backend)
        for take, video in zip(takes, videos, strict=True)
    ]
    means = mean_values(row for row in rows if row)
    extensions = config.extensions
    calls = (extensions.noise.warm_steps or config.sampling.steps) * (1 if extensions.sound.guidance == 1 else 2)
    return {
        **{name: means[name] for name in COLUMNS if name in means},
        "network_calls": calls,
        "faces": sum(map(bool, rows)),
    }


def table(rows: list[dict]) -> str:
    lines = ["| solver | spacing | steps | " + " | ".join(COLUMNS.values()) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for row in rows:
        setting = row["sampling"]
        steps = f"{setting['steps']}"
        steps += f", last {setting['warm_steps']} from the frame before" if setting["warm_steps"] else ""
        steps += f", guidance {setting['guidance']:g}" if setting["guidance"] != 1 else ""
        cells = [f"{row[name]:.2f}" if name != "network_calls" else str(row[name]) for name in COLUMNS if name in row]
        lines.append(f"| {setting['solver']} | {setting['spacing']} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
