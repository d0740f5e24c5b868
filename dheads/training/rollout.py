"""Roll-outs: motion frames that the averaged network generates during training.

Why: a network trained on true frames alone never sees its own errors, which then accumulate over a video.
Off: extensions.rollouts.share = 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dheads.conditioning import MotionBuffer
from dheads.config import Config, override
from dheads.extensions.motion import as_motion_frame
from dheads.extensions.network import ExtendedUNet
from dheads.sampling.engine import Engine, Inputs
from dheads.training.batches import Batch, Lead, noise_on, seeded


class RollOuts:
    """Generates the motion frames of batches with a network whose weights change between calls."""

    def __init__(self, unet: ExtendedUNet, config: Config) -> None:
        self._unet, self._config = unet, config
        self._engine: Engine | None = None

    def __call__(self, batch: Batch, step: int, part: int = 0) -> Batch:
        """The batch with the motion frames of its lead generated one after the other, as in sampling.

        All randomness depends on the seed, `step` and `part` only.
        """
        lead = batch.lead
        if lead is None:
            return batch
        engine = self._renewed_engine()
        generator = seeded(self._config.optimisation.seed, step, part, 1)
        generated = _motion_frames(engine, lead, batch.identity[lead.index].to(engine.device), generator)
        frames = batch.motion_frames.to(engine.device).index_copy(0, lead.index.to(engine.device), generated)
        return replace(batch, motion_frames=frames, lead=None)

    def _renewed_engine(self) -> Engine:
        """The engine with the network's present weights."""
        if self._engine is None:
            config = override(self._config, {"sampling": {"steps": self._config.extensions.rollouts.steps}})
            # Batch sizes vary, so that a recorded CUDA graph would serve a few frames only.
            self._engine = Engine(self._unet, config, recorded=False)
        else:
            self._engine.renew()
        return self._engine


@torch.no_grad()
def _motion_frames(engine: Engine, lead: Lead, identity: Tensor, generator: torch.Generator) -> Tensor:
    """Generate the motion frames (n, M, 3, H, W) that follow the lead; identity (n, 3, H, W)."""
    config, device = engine.config, engine.device
    buffer = MotionBuffer(identity, config.conditioning.motion_frames)
    for frame in lead.motion_frames.unbind(1):
        buffer.push(frame.to(device))
    x_T = None
    for k in range(lead.cues.audio_window.shape[1]):
        motion_frames = buffer.stacked()
        fresh = noise_on(device, (len(identity), engine.noises, *identity.shape[1:]), generator)
        noise, x_T = engine.frame_noise(fresh, x_T)
        eps = noise_on(device, motion_frames.shape, generator) if config.extensions.motion.noise else None
        cues = engine.unet.normalise(lead.cues[:, k].to(device))
        frame = engine.generate(Inputs(identity, motion_frames, cues, eps, noise), first=False)
        buffer.push(as_motion_frame(config, frame, identity, cues))
    return buffer.stacked()
