"""What training minimises: the loss of a batch, with the noise and the conditioning that training adds to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dheads import losses
from dheads.conditioning import Condition, build
from dheads.config import Config
from dheads.denoiser import Denoiser
from dheads.diffusion import q_sample, v_target
from dheads.model import UNet
from dheads.training.augment import drift, drop_patches
from dheads.training.batches import Batch, noise_on, seed_from, seeded

TALLIED = ("loss", "simple", "vlb", "lip", "eye", "simple_q1", "simple_q2", "simple_q3", "simple_q4")


def training_loss(denoiser: Denoiser, batch: Batch, config: Config, step: int, part: int = 0) -> dict[str, Tensor]:
    """The loss and its terms for each example, (B,): L = L_simple + lambda_vlb L_vlb + lambda_ls L_ls (paper eq. 9).

    Also `t` (B,), the timesteps. All randomness comes from the seed, the step and the part of its batch.
    """
    training, schedule = config.training, denoiser.schedule
    generator = seeded(training.seed, step, part)
    device = next(denoiser.unet.parameters()).device
    x_0 = batch.target.to(device)
    t = torch.randint(schedule.num_steps, (len(x_0),), generator=generator).to(device)
    eps = noise_on(device, x_0.shape, generator)
    condition = training_condition(denoiser.unet, batch, config, generator)
    torch.manual_seed(seed_from(generator))  # dropout draws from the global generator
    x_t = q_sample(schedule, x_0, t, eps)
    denoised, output = denoiser(x_t, t, condition)
    if training.snr_clip is None:
        # The paper: squared errors of the network's output.
        targets = {"eps": eps, "v": v_target(schedule, x_0, eps, t), "x_0": x_0}
        error = (output.prediction - targets[config.diffusion.prediction]).square()
    else:
        weight = losses.snr_weight(schedule, t, training.snr_clip)[:, None, None, None]
        error = weight * (denoised.x_0 - x_0).square()
    simple = error.flatten(1).mean(1)
    lip = losses.inside(error, batch.mouth_box)
    vlb = torch.zeros_like(simple)
    if denoised.var_frac is not None:
        vlb = losses.vlb(schedule, x_0, x_t, t, denoised.x_0, denoised.var_frac)
    eye = losses.inside(error, batch.eye_box)
    # Beyond the paper: the eyes, as the mouth.
    loss = losses.total(simple, vlb, lip, training.lambda_vlb, training.lambda_lip) + training.lambda_eye * eye
    return {"loss": loss, "simple": simple, "vlb": vlb, "lip": lip, "eye": eye, "t": t}


def training_condition(unet: UNet, batch: Batch, config: Config, generator: torch.Generator) -> Condition:
    """Conditioning with what training alone does: noise on motion frames and lip codes, sound taken away at times."""
    told, training = config.conditioning, config.training
    device = next(unet.parameters()).device
    count = len(batch.target)
    motion_frames = batch.motion_frames.to(device)
    if training.motion_drift > 0:
        motion_frames = drift(motion_frames, training.motion_drift, generator)
    if training.patch_drop > 0:
        motion_frames = drop_patches(motion_frames, training.patch_drop, generator)
    level = noise = None
    if told.motion_noise > 0:
        level = told.motion_noise * torch.rand(count, generator=generator).to(device)
        noise = noise_on(device, motion_frames.shape, generator)
    lips = None
    if unet.lips is not None:
        lips = unet.lips.normalise(batch.lip_window.to(device))
        lips = lips + training.lip_noise * noise_on(device, lips.shape, generator)
    heard = (torch.rand(count, generator=generator) >= training.audio_dropout).to(device)
    audio_window = batch.audio_window.to(device)
    heard = heard & audio_window.flatten(1).any(1)  # photos have none
    condition = build(
        config,
        batch.identity.to(device),
        motion_frames,
        audio_window,
        lips,
        level,
        noise,
        eye_window=batch.eye_window.to(device) if told.eye_dims else None,
    )
    return condition.heard(heard)


def tally(terms: dict[str, Tensor], num_steps: int) -> Tensor:
    """Sums and counts (9, 2) over a batch of what TALLIED names: the losses, and the simple one by quartile of t."""
    simple = terms["simple"]
    quartile = F.one_hot(terms["t"] * 4 // num_steps, 4).to(simple)  # (B, 4)
    means = torch.stack([terms[name].detach() for name in TALLIED[:5]])  # (5, B)
    sums = torch.cat([means.sum(1), simple.detach() @ quartile])
    return torch.stack([sums, torch.cat([sums.new_full((5,), len(simple)), quartile.sum(0)])], dim=1)
