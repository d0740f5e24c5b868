"""Resample weights for another picture size: the patches change their size, and the network on them stays the same.

    python recipes/enlarge.py --weights small --image-size 128 --patch-size 4 --out larger.safetensors

The kernels of the first convolution and the patches that the last one outputs are resampled. This blurs a little,
which training corrects within minutes (`dheads train --init`). The number of patches and all widths stay, and so does
the cost of a frame.
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
    weights: Annotated[str, typer.Option(help="Weights to resample: a name, or a checkpoint.")],
    image_size: Annotated[int, typer.Option(help="Picture side of the new weights, px.")],
    patch_size: Annotated[int, typer.Option(help="Patch side of the new weights, px.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
) -> None:
    """Resample weights for another picture size."""
    checkpoint = load(weights)
    config, tensors = checkpoint.config, dict(checkpoint.tensors)
    old_size, patches = config.network.image_size, config.extensions.patches
    if image_size * patches.size != old_size * patch_size:
        raise typer.BadParameter(f"pictures must stay {old_size // patches.size} patches wide")
    changes = {"network": {"image_size": image_size}, "extensions": {"patches": {"size": patch_size}}}
    finer = {"": 1, "detail.": 2} if patches.detail_channels else {"": 1}  # by network, its patches along a patch
    for part, factor in finer.items():
        old, new = patches.size // factor, patch_size // factor
        tensors[f"{part}stem.weight"] = _resampled_stem(tensors[f"{part}stem.weight"], old, new)
        for name in (f"{part}out_conv.weight", f"{part}out_conv.bias"):
            tensors[name] = _resampled_patches(tensors[name], old, new)
    save_checkpoint(out, tensors, override(config, changes), checkpoint.info)
    typer.echo(out)


def _resampled_stem(weight: Tensor, old: int, new: int) -> Tensor:
    """(O, C old^2, 3, 3) -> (O, C new^2, 3, 3): the same kernels on finer pixels, with the same sum."""
    outputs = len(weight)
    kernels = weight.view(outputs, -1, old, old, 3, 3).permute(0, 1, 4, 2, 5, 3)  # (O, C, 3, old, 3, old)
    pixels = kernels.reshape(outputs, -1, 3 * old, 3 * old)
    finer = F.interpolate(pixels, size=3 * new, mode="bilinear") * (old / new) ** 2
    return finer.view(outputs, -1, 3, new, 3, new).permute(0, 1, 3, 5, 2, 4).reshape(outputs, -1, 3, 3)


def _resampled_patches(values: Tensor, old: int, new: int) -> Tensor:
    """(C old^2, ...) -> (C new^2, ...): the same patches in finer pixels."""
    patches = values.reshape(-1, old, old, values[0].numel()).permute(0, 3, 1, 2)  # (C, N, old, old)
    finer = F.interpolate(patches, size=new, mode="bilinear")  # (C, N, new, new)
    return finer.permute(0, 2, 3, 1).reshape(-1, *values.shape[1:])


if __name__ == "__main__":
    typer.run(main)
