"""Motion frames of the network's own making (beyond the paper): a network that was only ever told true frames does not
know its own errors, which then pile up in a video."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dheads.conditioning import MotionBuffer
from dheads.config import Config
from dheads.draws import Batch
from dheads.engine import Engine, Inputs
from dheads.model import UNet


def rolled_out(unet: UNet, batch: Batch, config: Config, step: int, part: int = 0) -> Batch:
    """The batch with the motion frames that its lead asks for, drawn one after the other as in sampling.

    All randomness comes from the seed, the step and the part of its batch.
    """
    lead = batch.lead
    if lead is None:
        return batch
    told, sampling = config.conditioning, replace(config.sampling, steps=config.training.rollout_draws)
    engine = Engine(unet, sampling)  # made anew each time: the weights have changed
    entropy = np.random.SeedSequence([config.training.seed, step, part, 1]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(entropy[0] >> 1))
    device = engine.device
    identity = batch.identity[lead.index].to(device)  # (n, 3, H, W)
    buffer = MotionBuffer(identity, told.motion_frames, sampling.identity_anchor)
    for frame in lead.motion_frames.unbind(1):
        buffer.push(frame.to(device))
    x_T, share = None, engine.shared_noise(0.0)
    for k in range(lead.audio_windows.shape[1]):
        motion_frames = buffer.stacked()
        noise = torch.randn((len(identity), engine.draws, *identity.shape[1:]), generator=generator).to(device)
        if x_T is not None:
            noise[:, :1] = share.sqrt() * x_T + (1 - share).sqrt() * noise[:, :1]
        x_T = noise[:, :1].clone()
        noise[:, :1] *= engine.temperature
        eps = torch.randn(motion_frames.shape, generator=generator).to(device) if told.motion_noise else None
        inputs = Inputs(
            identity,
            motion_frames,
            lead.audio_windows[:, k].to(device),
            None if unet.lips is None else unet.lips.normalise(lead.lip_windows[:, k].to(device)),
            eps,
            noise,
            lead.eye_windows[:, k].to(device) if told.eye_dims else None,
        )
        buffer.push(engine.draw(inputs, first=not engine.warms))
    made = buffer.stacked().to(batch.motion_frames)
    return replace(batch, motion_frames=batch.motion_frames.index_copy(0, lead.index, made), lead=None)
