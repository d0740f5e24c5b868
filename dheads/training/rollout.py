"""Roll-outs: motion frames that the network generates itself in training.

Why: a network that was only ever given true frames does not know its own errors, which then accumulate in a video.
Off: extensions.rollouts.share = 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dheads.config import Config, override
from dheads.extensions.motion import AnchoredBuffer
from dheads.extensions.network import ExtendedUNet
from dheads.sampling.engine import Engine, Inputs
from dheads.training.batches import Batch, Lead, noise_on, seeded


class RollOuts:
    """Generates motion frames with a network that goes on learning."""

    def __init__(self, unet: ExtendedUNet, config: Config) -> None:
        self._unet, self._config = unet, config
        self._engine: Engine | None = None

    def __call__(self, batch: Batch, step: int, part: int = 0) -> Batch:
        """The batch with the motion frames that its lead asks for, generated one after the other as in sampling.

        All randomness comes from the seed, the step and the part of its batch.
        """
        lead = batch.lead
        if lead is None:
            return batch
        engine = self._renewed()
        generator = seeded(self._config.optimisation.seed, step, part, 1)
        made = _generated(engine, lead, batch.identity[lead.index].to(engine.device), generator)
        frames = batch.motion_frames.to(engine.device).index_copy(0, lead.index.to(engine.device), made)
        return replace(batch, motion_frames=frames, lead=None)

    def _renewed(self) -> Engine:
        if self._engine is None:
            config = override(self._config, {"sampling": {"steps": self._config.extensions.rollouts.steps}})
            # Leads are of many sizes: each would be recorded for a few frames.
            self._engine = Engine(self._unet, config, recorded=False)
        else:
            self._engine.renew()
        return self._engine


@torch.no_grad()
def _generated(engine: Engine, lead: Lead, identity: Tensor, generator: torch.Generator) -> Tensor:
    """The motion frames (n, M, 3, H, W) that follow from the lead, of people with that identity (n, 3, H, W)."""
    config, device = engine.config, engine.device
    buffer = AnchoredBuffer(identity, config.conditioning.motion_frames, config.extensions.motion.anchor)
    for frame in lead.motion_frames.unbind(1):
        buffer.push(frame.to(device))
    x_T = None
    for k in range(lead.cues.audio_window.shape[1]):
        motion_frames = buffer.stacked()
        fresh = noise_on(device, (len(identity), engine.noises, *identity.shape[1:]), generator)
        noise, x_T = engine.frame_noise(fresh, x_T)
        eps = noise_on(device, motion_frames.shape, generator) if config.extensions.motion.noise else None
        cues = engine.unet.normalise(lead.cues[:, k].to(device))
        buffer.push(engine.generate(Inputs(identity, motion_frames, cues, eps, noise), first=False))
    return buffer.stacked()
