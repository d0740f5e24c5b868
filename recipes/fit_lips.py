"""Fit the lip code of weights to a dataset again, and change nothing else: weights to start training from.

    python recipes/fit_lips.py --weights small --data data --out start.safetensors

For a dataset with more clips, or one prepared with other `preparation.speech_tempos`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from dheads.dataset.dataset import Dataset
from dheads.errors import DheadsError
from dheads.weights.checkpoints import build_model, load, save_checkpoint


def main(
    data: Annotated[Path, typer.Option(help="Dataset made by `dheads prepare`.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
    weights: Annotated[str, typer.Option(help="Weights with a lip code: a name, or a checkpoint.")] = "small",
) -> None:
    """Fit the lip code of weights to a dataset again."""
    checkpoint = load(weights)
    unet = build_model(checkpoint, torch.device("cpu"))
    if unet.lip_predictor is None:
        raise DheadsError(f"{weights} has no lip code; choose weights trained with extensions.codes.lips")
    correlation = unet.lip_predictor.fit(Dataset(data).lip_clips("train"))
    typer.echo("correlation on speakers left out: " + ", ".join(f"{r:.3f}" for r in correlation.tolist()), err=True)
    save_checkpoint(out, unet.state_dict(), checkpoint.config, checkpoint.info)
    typer.echo(out)


if __name__ == "__main__":
    typer.run(main)
