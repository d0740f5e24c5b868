"""The training loss of a batch, and the condition that the network is given for it."""

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
from dheads.extensions.network import ExtendedOutput, ExtendedUNet
from dheads.extensions.warp import landmark_error, sampled, taken_from
from dheads.model import Output
from dheads.training.batches import Batch, noise_on, seed_from, seeded

_TERMS = ("loss", "simple", "vlb", "lip")
_WARP_TERMS = ("landmarks", "moved", "own")
_QUARTILES = ("simple_q1", "simple_q2", "simple_q3", "simple_q4")


def tallied(config: Config) -> tuple[str, ...]:
    """The names of the rows of `tally`: the loss terms, those of codes, and the simple loss by quartile of t."""
    return (*_named(config), *_QUARTILES)


def _named(config: Config) -> tuple[str, ...]:
    """The names of the loss terms."""
    return (*_TERMS, *weighted_codes(config), *(_WARP_TERMS if config.extensions.warp.flow else ()))


def weighted_codes(config: Config) -> list[str]:
    """The names of the codes that have an extra loss in their region."""
    return [code.name for code in codes_of(config) if config.extensions.codes[code.name].weight > 0]


def training_loss(denoiser: Denoiser, batch: Batch, config: Config, step: int, part: int = 0) -> dict[str, Tensor]:
    """Each example's loss and its terms by name, (B,) each, and `t` (B,), the timesteps.

    All randomness depends on the seed, `step` and `part` only.
    """
    optimisation, schedule, unet = config.optimisation, denoiser.schedule, denoiser.unet
    assert isinstance(unet, ExtendedUNet)
    generator = seeded(optimisation.seed, step, part)
    device = next(unet.parameters()).device
    x_0 = batch.target.to(device)
    t = torch.randint(schedule.num_steps, (len(x_0),), generator=generator).to(device)
    eps = noise_on(device, x_0.shape, generator)
    condition = training_condition(unet, batch, config, generator)
    torch.manual_seed(seed_from(generator))  # dropout uses the global generator
    x_t = q_sample(schedule, x_0, t, eps)
    denoised, output = denoiser(x_t, t, condition)
    if config.extensions.snr_clip is None:
        # The paper: the squared error of the network's prediction.
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
    # L = L_simple + lambda_vlb L_vlb + lambda_ls L_ls (paper eq. 9)
    loss = losses.total(simple, vlb, lip, optimisation.lambda_vlb, optimisation.lambda_lip)
    terms = {"simple": simple, "vlb": vlb, "lip": lip}
    for name in weighted_codes(config):  # beyond the paper: a loss in the regions of codes, as L_ls in the mouth's
        terms[name] = losses.inside(error, batch.code_boxes[name])
        loss = loss + config.extensions.codes[name].weight * terms[name]
    if (warp := config.extensions.warp).flow:
        terms |= _warp_terms(output, condition, batch.points, x_0)
        loss = loss + warp.landmark_weight * terms["landmarks"] + warp.moved_weight * terms["moved"]
        loss = loss + warp.own_weight * terms["own"]
    return {"loss": loss, **terms, "t": t}


def _warp_terms(output: Output, condition: MotionCondition, points: Tensor | None, x_0: Tensor) -> dict[str, Tensor]:
    """What the photo moved should be, (B,) each: see WarpConfig. points (B, 2, 68, 2); x_0 (B, 3, H, W) the target.

    Without these terms the network redraws a face softly, rather than move it.
    """
    assert isinstance(output, ExtendedOutput)
    assert output.flow is not None
    assert output.gates is not None
    assert condition.photo is not None
    assert points is not None
    taken = taken_from(condition.photo, output.gates, output.flow)
    moved = sampled(condition.identity, taken.grid, "bilinear")
    own = taken.share[:, :1] * (1 - condition.photo.mask)
    return {
        "landmarks": landmark_error(taken.grid, *points.to(moved.device).unbind(1)),
        "moved": (moved - x_0).square().flatten(1).mean(1),
        "own": own.flatten(1).mean(1),
    }


def training_condition(unet: ExtendedUNet, batch: Batch, config: Config, generator: torch.Generator) -> MotionCondition:
    """The condition of a batch as altered in training.

    Motion frames have drift, holes and noise; codes have noise; and a share of the examples has no sound.
    """
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
    """Sum and number of examples (N, 2) over a batch, one row for each name in `tallied`."""
    simple, names = terms["simple"], _named(config)
    quartile = F.one_hot(terms["t"] * 4 // config.diffusion.num_steps, 4).to(simple)  # (B, 4)
    means = torch.stack([terms[name].detach() for name in names])  # (N - 4, B)
    sums = torch.cat([means.sum(1), simple.detach() @ quartile])
    return torch.stack([sums, torch.cat([sums.new_full((len(names),), len(simple)), quartile.sum(0)])], dim=1)
