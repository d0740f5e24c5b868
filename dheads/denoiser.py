"""A network and its schedule as the solvers want it: x_t in, x_0 out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dheads.conditioning import Condition, blend_copies
from dheads.config import Config, DiffusionConfig
from dheads.diffusion import Denoised, Schedule, cosine_schedule, keep_seen, x_0_from
from dheads.model import Output, UNet


def training_schedule(config: DiffusionConfig) -> Schedule:
    """The schedule of all T steps that the network is trained with."""
    return cosine_schedule(config.num_steps, config.cosine_s, config.beta_max)


def denoised(
    config: Config, schedule: Schedule, x_t: Tensor, t: Tensor | int, output: Output, told: Condition
) -> Denoised:
    """What the network says of x_t (B, 3, H, W) at original timesteps t, as x_0 in float32, unclamped."""
    x_0 = x_0_from(schedule, x_t, t, output.prediction.float(), config.diffusion.prediction)
    if output.gates is not None:
        x_0 = blend_copies(x_0, output.gates.float(), told)
    if output.keep is not None:
        x_0 = keep_seen(schedule, x_0, x_t, t, output.keep.float())
    return Denoised(x_0, None if output.var_frac is None else output.var_frac.float())


class Denoiser:
    """Runs the network, in bf16 where told to, and turns what it predicts into x_0 in float32."""

    def __init__(
        self, unet: UNet, precision: str = "fp32", network: Callable[[Tensor, Tensor, Condition], Output] | None = None
    ) -> None:
        """network: what computes the output in place of `unet` itself, such as its DistributedDataParallel."""
        self.unet = unet
        self._network = network or unet
        self.schedule = training_schedule(unet.config.diffusion)
        self._bf16 = precision == "bf16"

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Denoised, Output]:
        """x_t (B, 3, H, W) at original timesteps t (B,) -> x_0, unclamped, and the network's own words."""
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self._bf16):
            output = self._network(x_t, t, condition)
        x_0 = denoised(self.unet.config, self.schedule, x_t, t, output, condition)
        return x_0, replace(output, prediction=output.prediction.float(), var_frac=x_0.var_frac)
