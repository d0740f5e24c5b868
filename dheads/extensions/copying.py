"""Copy gates and the mouth mask: pixels outside the mouth come from the last motion frame and the identity.

Why: a network trained for hours cannot draw hair and skin as sharp as the photo, and need not where nothing moves: with
gates everything outside the mouth is crisp after 16,000 examples.
Off: extensions.copying.gates = false.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dheads.conditioning import Condition
from dheads.config import AlignmentConfig, Config


def uses_mouth_mask(config: Config) -> bool:
    """Whether anything in the configuration depends on where the mouth is."""
    return config.extensions.copying.gates or config.extensions.motion.hide_mouth


@lru_cache(maxsize=32)
def mouth_mask(alignment: AlignmentConfig, size: int, device: torch.device) -> Tensor:
    """(1, 1, H, W) in [0, 1]: `mouth_ellipse` in a crop of `size` px."""
    with torch.inference_mode(False):  # the kept tensor is also used where gradients are computed
        return mouth_ellipse(alignment, pixel_grid(size, device))[None, None]


def pixel_grid(size: int, device: torch.device) -> Tensor:
    """The centres of all pixels, (H, W, 2) as x and y from -1 to 1."""
    pixels = (2 * torch.arange(size, device=device) + 1) / size - 1
    return torch.stack(torch.meshgrid(pixels, pixels, indexing="xy"), -1)


def mouth_ellipse(alignment: AlignmentConfig, points: Tensor) -> Tensor:
    """In [0, 1] at points (..., 2) from -1 to 1 across the crop: an ellipse around the mean face's mouth and chin."""
    x, y = points.unbind(-1)
    d = 2 * alignment.eye_distance
    return _ellipse(x, y - (2 * alignment.eye_y - 1 + 1.28 * d), 0.72 * d, 0.60 * d)


def eye_ellipses(alignment: AlignmentConfig, points: Tensor) -> Tensor:
    """As `mouth_ellipse`, around the mean face's eyes with their lids."""
    x, y = points.unbind(-1)
    d = 2 * alignment.eye_distance
    # Both eyes at once, as a face is alike on its two sides
    return _ellipse(x.abs() - d / 2, y - (2 * alignment.eye_y - 1), 0.36 * d, 0.26 * d)


def head_ellipse(alignment: AlignmentConfig, points: Tensor) -> Tensor:
    """As `mouth_ellipse`, around the mean face's head with its ears and most of its hair."""
    x, y = points.unbind(-1)
    d = 2 * alignment.eye_distance
    return _ellipse(x, y - (2 * alignment.eye_y - 1 + 0.4 * d), 1.58 * d, 1.92 * d)


def face_ellipse(alignment: AlignmentConfig, points: Tensor) -> Tensor:
    """As `mouth_ellipse`, around the mean face without ears and hair."""
    x, y = points.unbind(-1)
    d = 2 * alignment.eye_distance
    return _ellipse(x, y - (2 * alignment.eye_y - 1 + 0.5 * d), 1.15 * d, 1.5 * d)


def _ellipse(x: Tensor, y: Tensor, radius_x: float, radius_y: float) -> Tensor:
    """1 within an ellipse about the origin, 0 outside, with a soft edge."""
    edge = 0.2
    radius = torch.hypot(x / radius_x, y / radius_y)  # 1 on the ellipse
    return ((1 + edge / 2 - radius) / edge).clamp(0, 1)


def blend_copies(x_0: Tensor, gates: Tensor, condition: Condition, mask: Tensor) -> Tensor:
    """x_0 = g_0 x_0 + g_1 x^(k-1) + g_2 x_Id with g = softmax(0, a, b), outside the mouth mask.

    x_0 (B, 3, H, W) is the network's own; gates (B, 2, H, W) are its logits a and b; mask (1, 1, H, W).
    """
    weights = F.softmax(F.pad(gates, (0, 0, 0, 0, 1, 0)), dim=1)  # (B, 3, H, W)
    copies = weights[:, 1:2] * condition.motion_frames[:, -1] + weights[:, 2:3] * condition.identity
    blended = weights[:, :1] * x_0 + copies
    return torch.lerp(blended, x_0, mask)
