"""Motion frames of the network's own making (beyond the paper): a network that was only ever told true frames does not
know its own errors, which then pile up in a video."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dheads.conditioning import MotionBuffer
from dheads.config import Config
from dheads.model import UNet
from dheads.sampling.engine import Engine, Inputs
from dheads.training.batches import Batch, Lead, noise_on, seeded


class RollOuts:
    """Draws motion frames with a network that goes on learning."""

    def __init__(self, unet: UNet, config: Config) -> None:
        self._unet, self._config = unet, config
        self._engine: Engine | None = None

    def __call__(self, batch: Batch, step: int, part: int = 0) -> Batch:
        """The batch with the motion frames that its lead asks for, drawn one after the other as in sampling.

        All randomness comes from the seed, the step and the part of its batch.
        """
        lead = batch.lead
        if lead is None:
            return batch
        engine = self._renewed()
        generator = seeded(self._config.training.seed, step, part, 1)
        made = _drawn(engine, lead, batch.identity[lead.index].to(engine.device), generator)
        frames = batch.motion_frames.to(engine.device).index_copy(0, lead.index.to(engine.device), made)
        return replace(batch, motion_frames=frames, lead=None)

    def _renewed(self) -> Engine:
        if self._engine is None:
            sampling = replace(self._config.sampling, steps=self._config.training.rollout_draws)
            # Leads are of many sizes: each would be recorded for a few frames.
            self._engine = Engine(self._unet, sampling, recorded=False)
        else:
            self._engine.renew()
        return self._engine


@torch.no_grad()
def _drawn(engine: Engine, lead: Lead, identity: Tensor, generator: torch.Generator) -> Tensor:
    """The motion frames (n, M, 3, H, W) that follow from the lead of people who look so, (n, 3, H, W)."""
    told, device, lips = engine.config.conditioning, engine.device, engine.unet.lips
    buffer = MotionBuffer(identity, told.motion_frames, engine.sampling.identity_anchor)
    for frame in lead.motion_frames.unbind(1):
        buffer.push(frame.to(device))
    x_T = None
    for k in range(lead.audio_windows.shape[1]):
        motion_frames = buffer.stacked()
        fresh = noise_on(device, (len(identity), engine.draws, *identity.shape[1:]), generator)
        noise, x_T = engine.frame_noise(fresh, x_T)
        eps = noise_on(device, motion_frames.shape, generator) if told.motion_noise else None
        inputs = Inputs(
            identity,
            motion_frames,
            lead.audio_windows[:, k].to(device),
            None if lips is None else lips.normalise(lead.lip_windows[:, k].to(device)),
            eps,
            noise,
            lead.eye_windows[:, k].to(device) if told.eye_dims else None,
        )
        buffer.push(engine.draw(inputs, first=False))
    return buffer.stacked()
