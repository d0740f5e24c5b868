"""x_T shared between consecutive frames, so that what the sound leaves open looks alike in each of them.

Why: with noise of its own in every frame a pixel outside the mouth changes by 4.6 to 7.2 of 255 a frame; with shared
and cooler noise by 0.8 to 1.7. Off: extensions.noise at its defaults.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dheads.config import Config
from dheads.extensions.copying import mouth_mask, uses_mouth_mask


class NoiseSharing:
    """The noise of each frame, from noise of its own and from that of the frame before."""

    def __init__(self, config: Config, device: torch.device) -> None:
        noise = config.extensions.noise
        # By pixel, (1, 1, 1, H, W), or one number.
        mouth = torch.ones(1, device=device)
        if uses_mouth_mask(config):
            mouth = mouth_mask(config.alignment, config.network.image_size, device)[None]
        self._share = noise.outer_shared + (noise.shared - noise.outer_shared) * mouth
        self._temperature = noise.outer_temperature + (noise.temperature - noise.outer_temperature) * mouth
        self._in_pauses = noise.pause_shared

    def __call__(self, fresh: Tensor, last: Tensor | None, pause: float = 0.0) -> tuple[Tensor, Tensor]:
        """A frame's noise, of standard normal numbers (B, N, 3, H, W), and what to pass as `last` for the next frame.

        last: (B, 1, 3, H, W), returned for the frame before. pause: how far it is one, 0 .. 1.
        """
        x_T = fresh[:, :1]
        if last is not None:
            share = self._share.clamp(min=self._in_pauses * pause)
            # x_T = sqrt(s) x_T^(k-1) + sqrt(1 - s) eps: nothing stays for good, so nothing accumulates
            x_T = share.sqrt() * last + (1 - share).sqrt() * x_T
        return torch.cat([self._temperature * x_T, fresh[:, 1:]], dim=1), x_T
