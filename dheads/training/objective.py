"""The loss of a batch, and the condition that it is computed with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dheads import losses
from dheads.conditioning import Cues
from dheads.config import Config
from dheads.denoiser import Denoiser
from dheads.diffusion import q_sample, v_target
from dheads.extensions.codes import codes_of
from dheads.extensions.guidance import silenced
from dheads.extensions.motion import MotionCondition, condition_with, spoiled
from dheads.extensions.network import ExtendedUNet
from dheads.training.batches import Batch, noise_on, seed_from, seeded

_TERMS = ("loss", "simple", "vlb", "lip")
_QUARTILES = ("simple_q1", "simple_q2", "simple_q3", "simple_q4")


def tallied(config: Config) -> tuple[str, ...]:
    """The names of what `tally` counts: the losses, those of codes, and the simple one by quartile of t."""
    return (*_TERMS, *weighted_codes(config), *_QUARTILES)


def weighted_codes(config: Config) -> list[str]:
    """The codes that have a loss of their own."""
    return [code.name for code in codes_of(config) if config.extensions.codes[code.name].weight > 0]


def training_loss(denoiser: Denoiser, batch: Batch, config: Config, step: int, part: int = 0) -> dict[str, Tensor]:
    """The loss and its terms for each example, (B,): L = L_simple + lambda_vlb L_vlb + lambda_ls L_ls (paper eq. 9).

    Also `t` (B,), the timesteps. All randomness comes from the seed, the step and the part of its batch.
    """
    optimisation, schedule = config.optimisation, denoiser.schedule
    generator = seeded(optimisation.seed, step, part)
    device = next(denoiser.unet.parameters()).device
    x_0 = batch.target.to(device)
    t = torch.randint(schedule.num_steps, (len(x_0),), generator=generator).to(device)
    eps = noise_on(device, x_0.shape, generator)
    condition = training_condition(denoiser.unet, batch, config, generator)
    torch.manual_seed(seed_from(generator))  # dropout draws from the global generator
    x_t = q_sample(schedule, x_0, t, eps)
    denoised, output = denoiser(x_t, t, condition)
    if config.extensions.snr_clip is None:
        # The paper: squared errors of the network's output.
        targets = {"eps": eps, "v": v_target(schedule, x_0, eps, t), "x_0": x_0}
        error = (output.prediction - targets[config.diffusion.prediction]).square()
    else:
        weight = losses.snr_weight(schedule, t, config.extensions.snr_clip)[:, None, None, None]
        error = weight * (denoised.x_0 - x_0).square()
    simple = error.flatten(1).mean(1)
    lip = losses.inside(error, batch.mouth_box)
    vlb = torch.zeros_like(simple)
    if denoised.var_frac is not None:
        vlb = losses.vlb(schedule, x_0, x_t, t, denoised.x_0, denoised.var_frac)
    loss = losses.total(simple, vlb, lip, optimisation.lambda_vlb, optimisation.lambda_lip)
    terms = {"simple": simple, "vlb": vlb, "lip": lip}
    for name in weighted_codes(config):  # beyond the paper: other regions, as the mouth
        terms[name] = losses.inside(error, batch.code_boxes[name])
        loss = loss + config.extensions.codes[name].weight * terms[name]
    return {"loss": loss, **terms, "t": t}


def training_condition(unet: ExtendedUNet, batch: Batch, config: Config, generator: torch.Generator) -> MotionCondition:
    """The condition with what training alone does: motion frames are spoiled, codes noisy, and sound is absent at
    times."""
    device = next(unet.parameters()).device
    count, extensions = len(batch.target), config.extensions
    motion_frames = spoiled(config, batch.motion_frames.to(device), generator)
    level = eps = None
    if extensions.motion.noise > 0:
        level = extensions.motion.noise * torch.rand(count, generator=generator).to(device)
        eps = noise_on(device, motion_frames.shape, generator)
    cues = unet.normalise(batch.cues.to(device))
    codes = dict(cues.codes)
    for name, code in cues.codes.items():
        if (std := extensions.codes[name].noise) > 0:
            codes[name] = code + std * noise_on(device, code.shape, generator)
    heard = (torch.rand(count, generator=generator) >= extensions.sound.dropout).to(device)
    heard = heard & cues.audio_window.flatten(1).any(1)  # photos have no sound
    identity = batch.identity.to(device)
    condition = condition_with(config, identity, motion_frames, Cues(cues.audio_window, codes), level, eps)
    return silenced(condition, heard)


def tally(terms: dict[str, Tensor], config: Config) -> Tensor:
    """Sums and counts (N, 2) over a batch of what `tallied` names."""
    simple, names = terms["simple"], [*_TERMS, *weighted_codes(config)]
    quartile = F.one_hot(terms["t"] * 4 // config.diffusion.num_steps, 4).to(simple)  # (B, 4)
    means = torch.stack([terms[name].detach() for name in names])  # (N - 4, B)
    sums = torch.cat([means.sum(1), simple.detach() @ quartile])
    return torch.stack([sums, torch.cat([sums.new_full((len(names),), len(simple)), quartile.sum(0)])], dim=1)
