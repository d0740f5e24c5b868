"""The loss of JPEG compression, computed on any device.

The baseline codec (ITU-T T.81) with the tables of its annex K, scaled by libjpeg's quality, and chroma at half the
resolution. Entropy coding is left out, as it is lossless.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def through_jpeg(pictures: Tensor, quality: Tensor) -> Tensor:
    """Pictures (B, N, 3, H, W) in 0 .. 255 after JPEG compression with each example's quality (B,), 1 .. 100."""
    height, width = pictures.shape[-2:]
    flat = pictures.flatten(0, 1)  # (B N, 3, H, W)
    flat = F.pad(flat, (0, -width % 16, 0, -height % 16), mode="replicate")
    ycc = _convert(_TO_YCC, flat)  # chroma around 0
    luma_table, chroma_table = (table.repeat_interleave(pictures.shape[1], 0) for table in _tables(quality.to(flat)))
    luma = _quantised(ycc[:, :1] - 128, luma_table) + 128
    chroma = _quantised(F.avg_pool2d(ycc[:, 1:], 2), chroma_table)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    rgb = _convert(_TO_RGB, torch.cat([luma, chroma], 1)).round_().clamp_(0, 255)
    return rgb[..., :height, :width].reshape(pictures.shape)


def _convert(matrix: tuple[tuple[float, ...], ...], pictures: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in another colour space."""
    return (pictures.new_tensor(matrix) @ pictures.flatten(2)).view_as(pictures)


def _tables(quality: Tensor) -> list[Tensor]:
    """The quantisation tables (B, 8, 8) of luma and of chroma."""
    scale = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)[:, None, None]
    return [((quality.new_tensor(base) * scale + 50) / 100).floor().clamp(1, 255) for base in (_LUMA, _CHROMA)]


def _quantised(planes: Tensor, table: Tensor) -> Tensor:
    """Planes (B, C, H, W), the DCT coefficients of each 8 x 8 px block rounded to multiples of `table` (B, 8, 8)."""
    dct = _dct(planes.device)
    blocks = torch.unflatten(F.pixel_unshuffle(planes, 8), 1, (-1, 64)).flatten(3)  # (B, C, 64, HW / 64)
    steps = table.flatten(1)[:, None, :, None]
    coefficients = (dct @ blocks).div_(steps).round_().mul_(steps)
    blocks = dct.T @ coefficients
    return F.pixel_shuffle(torch.unflatten(blocks.flatten(1, 2), 2, [side // 8 for side in planes.shape[2:]]), 8)


@lru_cache(maxsize=4)
def _dct(device: torch.device) -> Tensor:
    """The DCT of an 8 x 8 block as one orthogonal matrix (64, 64)."""
    u, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    # D_ux = c_u cos((2x + 1) u pi / 16), c_0 = sqrt(1/8), c_u = 1/2; of a block F = D f D^T
    rows = torch.cos((2 * x + 1) * u * math.pi / 16) / 2
    rows[0] = math.sqrt(1 / 8)
    return torch.kron(rows, rows).to(device)
