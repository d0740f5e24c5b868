"""Weights for pictures of another size from those of one: the patches grow, the network within stays as it is.

    python recipes/enlarge.py --weights small --image-size 128 --patch-size 4 --out larger.safetensors

The first convolution's kernels are resampled, and so are the patches that the last one draws; what that blurs, training
mends within minutes (`dheads train --init`). Number of patches and all widths stay, so a frame costs what it did.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch.nn.functional as F
import typer
from torch import Tensor

from dheads.config import override
from dheads.weights.checkpoints import load, save_checkpoint


def main(
    weights: Annotated[str, typer.Option(help="Name of weights, or a checkpoint.")],
    image_size: Annotated[int, typer.Option(help="Of the new weights, px.")],
    patch_size: Annotated[int, typer.Option(help="Of the new weights, px.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
) -> None:
    """Resample weights for another picture size."""
    checkpoint = load(weights)
    net, tensors = checkpoint.config.model, dict(checkpoint.tensors)
    if image_size * net.patch_size != net.image_size * patch_size:
        raise typer.BadParameter(f"pictures must stay {net.image_size // net.patch_size} patches wide")
    config = override(checkpoint.config, {"model": {"image_size": image_size, "patch_size": patch_size}})
    parts = {"": 1, "detail.": 2} if net.detail_channels else {"": 1}  # and how many of its patches fit along one
    for part, finer in parts.items():
        old, new = net.patch_size // finer, patch_size // finer
        tensors[f"{part}stem.weight"] = _resampled_stem(tensors[f"{part}stem.weight"], old, new)
        for name in (f"{part}out_conv.weight", f"{part}out_conv.bias"):
            tensors[name] = _resampled_patches(tensors[name], old, new)
    save_checkpoint(out, tensors, config, checkpoint.info)
    typer.echo(out)


def _resampled_stem(weight: Tensor, old: int, new: int) -> Tensor:
    """(O, C old^2, 3, 3) -> (O, C new^2, 3, 3): the same kernel on finer pixels, whose sum stays."""
    outputs = len(weight)
    kernels = weight.view(outputs, -1, old, old, 3, 3).permute(0, 1, 4, 2, 5, 3)  # (O, C, 3, old, 3, old)
    pixels = kernels.reshape(outputs, -1, 3 * old, 3 * old)
    finer = F.interpolate(pixels, size=3 * new, mode="bilinear") * (old / new) ** 2
    return finer.view(outputs, -1, 3, new, 3, new).permute(0, 1, 3, 5, 2, 4).reshape(outputs, -1, 3, 3)


def _resampled_patches(values: Tensor, old: int, new: int) -> Tensor:
    """(C old^2, ...) -> (C new^2, ...): the same patch in more pixels."""
    patches = values.reshape(-1, old, old, values[0].numel()).permute(0, 3, 1, 2)  # (C, N, old, old)
    finer = F.interpolate(patches, size=new, mode="bilinear")  # (C, N, new, new)
    return finer.permute(0, 2, 3, 1).reshape(-1, *values.shape[1:])


if __name__ == "__main__":
    typer.run(main)
