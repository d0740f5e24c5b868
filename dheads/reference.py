"""The paper's sampling loop as plainly as it can be written (section 3.5): the reference of tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dheads.conditioning import Condition, Cues, MotionBuffer, window
from dheads.denoiser import denoised, training_schedule
from dheads.diffusion import Denoised, Schedule, sample_ddpm
from dheads.model import UNet


def audio_cues(embeddings: Tensor, context: int) -> list[Cues]:
    """The cues of every frame, B = 1, of speech embeddings (F, D)."""
    return [Cues(window(embeddings, frame, context)[None]) for frame in range(len(embeddings))]


@torch.inference_mode()
def reference_frames(
    unet: UNet, identity: Tensor, cues: Sequence[Cues], schedule: Schedule, noise: Iterator[Tensor]
) -> Iterator[Tensor]:
    """Yield the frames (B, 3, H, W) in [-1, 1] of people with that identity (B, 3, H, W), one for each of `cues`.

    schedule: the steps to take. noise: standard normal pictures, of each frame x_T, then one for each further step.
    """
    full = training_schedule(unet.config.diffusion)
    motion_frames = MotionBuffer(identity, unet.config.conditioning.motion_frames)
    for frame_cues in cues:
        condition = Condition(identity, motion_frames.stacked(), frame_cues)

        def denoise(x_t: Tensor, t: int, condition: Condition = condition) -> Denoised:
            output = unet(x_t, torch.full((len(x_t),), t, device=x_t.device), condition)
            return denoised(unet, full, x_t, t, output, condition)

        x_0 = sample_ddpm(denoise, schedule, next(noise), lambda: next(noise))
        motion_frames.push(x_0)
        yield x_0
