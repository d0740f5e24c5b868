"""The detail network: a shallow network on finer patches, which adds what the U-Net's patches lose.

Why: between its patches and its width, a U-Net on patches loses fine detail that x_t shows, however little noise there
is. Sharpness of the mouth rose from 0.60 of the truth's at 96 px to 0.74 at 128 px. Begins at zero, so that weights
without it can be trained on with it.
Off: extensions.patches.detail_channels = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dheads.diffusion import Schedule, noise_rate, signal_rate
from dheads.model import Layer, ResBlock, group_norm, zero_init

# The standard deviation of detail that a network on patches leaves out, in pictures of -1 .. 1: measured, at no noise.
UNDRAWN = 0.03


class Detail(nn.Module):
    """Convolutions on patches of half the U-Net's size, over the U-Net's last features."""

    def __init__(self, inputs: int, coarse: int, channels: int, outputs: int, blocks: Sequence[ResBlock]) -> None:
        """inputs: channels of a patch; coarse: the U-Net's width; outputs: channels of a patch."""
        super().__init__()
        self.stem = nn.Conv2d(inputs, channels, 3, padding=1)
        self.lift = nn.Conv2d(coarse, channels, 1)
        self.layers = nn.ModuleList(Layer(block) for block in blocks)
        self.out_norm = group_norm(channels)
        self.out_conv = zero_init(nn.Conv2d(channels, outputs, 3, padding=1))


def keep_seen(schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor | int, keep: Tensor) -> Tensor:
    """x_0 with the detail that x_t shows and the network cannot draw.

    As if that detail had a standard deviation of UNDRAWN; `keep` (B, 1, H, W) are the network's logits of more or less.
    """
    # x_0 + g (x_t / sqrt(ab) - x_0),  g = sigmoid(keep + log(UNDRAWN^2 ab / (1 - ab))): the Wiener filter at keep = 0
    signal, noise = signal_rate(schedule, t, x_t), noise_rate(schedule, t, x_t)
    share = torch.sigmoid(keep + 2 * torch.log(UNDRAWN * signal / noise))
    return torch.lerp(x_0, x_t / signal, share)
