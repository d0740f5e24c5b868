"""Runs a network for sampling: its device, precision and memory format, and what need not be computed twice.

Of one video's conditioning the time never changes; the audio and the pictures besides x_t change once a frame. So every
block's scale and shift by time are computed once a video, those by audio once a frame, and so is the first convolution
of the motion frames and the identity. What is left for every step is the network on x_t.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from dheads.conditioning import Condition, network_input
from dheads.denoiser import denoised, training_schedule
from dheads.diffusion import Denoise, Denoised, respaced
from dheads.model import UNet, modulation


class Engine:
    """A network at work with the timesteps of `steps` steps; x_t and the solver's arithmetic stay float32."""

    def __init__(self, unet: UNet, steps: int, dtype: torch.dtype | None = None) -> None:
        """dtype: what convolutions and attention compute in; None: what is fastest on the network's device."""
        self.unet, self.config = unet, unet.config
        self.device = next(unet.parameters()).device
        self.dtype = dtype or best_dtype(self.device)
        self._full = training_schedule(self.config.diffusion)
        self.schedule = respaced(self._full, steps, self.config.sampling.spacing)
        # Embeddings, scales and shifts are a trifle to compute: they stay float32.
        self._network = copy.deepcopy(unet).eval().to(self.dtype, memory_format=torch.channels_last)
        self._blocks = [[(b.time_affine, b.audio_affine) for b in layer.blocks()] for layer in unet.layers()]
        self._steps = {int(t): step for step, t in enumerate(self.schedule.timestep_map)}
        self._times: tuple[float | None, list[list[Tensor]]] | None = None

    def frame(self, condition: Condition) -> Denoise:
        """What a solver asks for one frame of B videos, with everything computed that is the same at every step."""
        patch, channels = self.config.model.patch_size, 3 * self.config.model.patch_size**2
        stem = self._network.stem
        # The stem is linear: what it makes of x_t is added at every step.
        others = network_input(self.config, torch.zeros_like(condition.identity), condition)
        still = stem(F.pixel_unshuffle(others, patch).to(self.dtype, memory_format=torch.channels_last))
        kernel = stem.weight[:, :channels]
        audio_emb = self.unet.embed_audio(condition)
        audio = [[affine(audio_emb) for _, affine in layer] for layer in self._blocks]  # (B, 2C) each
        modulations = [  # (steps, B, C) each
            [part.to(self.dtype) for t, y in zip(times, audios, strict=True) for part in modulation(t[:, None], y)]
            for times, audios in zip(self._time_affines(condition.motion_noise), audio, strict=True)
        ]

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            h = F.conv2d(F.pixel_unshuffle(x_t, patch).to(still), kernel, padding=1) + still
            step = self._steps[int(t[0])]
            output = self._network.denoise(h, [[part[step] for part in layer] for layer in modulations])
            return denoised(self.config, self._full, x_t, t, output, condition)

        return denoise

    def _time_affines(self, motion_noise: Tensor | None) -> list[list[Tensor]]:
        """By layer and block: what each step says, (steps, 2C). The noise's level is a video's own."""
        level = None if motion_noise is None else float(motion_noise[0])
        if self._times is None or self._times[0] != level:
            t = self.schedule.timestep_map.to(self.device)
            noise = None if motion_noise is None else motion_noise[:1].expand(len(t))
            time_emb = self.unet.embed_time(t, noise)  # (steps, E)
            self._times = level, [[affine(time_emb) for affine, _ in layer] for layer in self._blocks]
        return self._times[1]


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
    return torch.float32
