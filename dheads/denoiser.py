"""A network and its schedule as the solvers need them: x_t in, x_0 out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dheads.conditioning import Condition
from dheads.config import DiffusionConfig
from dheads.diffusion import Denoised, Schedule, cosine_schedule, x_0_from
from dheads.model import Output, UNet

Network = Callable[[Tensor, Tensor, Condition], Output]  # (x_t, t, condition)


def training_schedule(config: DiffusionConfig) -> Schedule:
    """The schedule of all T steps that the network is trained with."""
    return cosine_schedule(config.num_steps, config.cosine_s, config.beta_max)


def denoised(
    unet: UNet, schedule: Schedule, x_t: Tensor, t: Tensor | int, output: Output, condition: Condition
) -> Denoised:
    """The network's output for x_t (B, 3, H, W) at original timesteps t as x_0 in float32, unclamped."""
    x_0 = x_0_from(schedule, x_t, t, output.prediction.float(), unet.config.diffusion.prediction)
    x_0 = unet.compose(schedule, x_0, x_t, t, output, condition)
    return Denoised(x_0, None if output.var_frac is None else output.var_frac.float())


class Denoiser:
    """Runs the network, in bf16 if asked to, and turns its prediction into x_0 in float32."""

    def __init__(self, unet: UNet, precision: str = "fp32", network: Network | None = None) -> None:
        """network: computes the output instead of `unet` itself, such as its DistributedDataParallel."""
        self.unet = unet
        self._network = network or unet
        self.schedule = training_schedule(unet.config.diffusion)
        self._bf16 = precision == "bf16"

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Denoised, Output]:
        """x_t (B, 3, H, W) at original timesteps t (B,) -> x_0, unclamped, and the raw output."""
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self._bf16):
            output = self._network(x_t, t, condition)
        x_0 = denoised(self.unet, self.schedule, x_t, t, output, condition)
        return x_0, replace(output, prediction=output.prediction.float(), var_frac=x_0.var_frac)
