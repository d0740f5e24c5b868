"""Pixels: uint8 in [0, 255] <-> float32 in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch


def to_unit(frames: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32 in [-1, 1]."""
    values = torch.as_tensor(frames).movedim(-1, -3).to(torch.float32, copy=True)
    return values.div_(127.5).sub_(1)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """(..., 3, H, W) in [-1, 1] -> (..., H, W, 3) uint8 on the same device, rounded; values outside are clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()
