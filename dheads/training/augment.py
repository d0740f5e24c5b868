"""Makes few faces into many by random changes, the same for all frames of one example; and spoils motion frames.

Pictures may be on any device. The random numbers come from a generator on the CPU, so they are the same everywhere.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dheads.training.jpeg import through_jpeg


def augment(frames: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """frames (B, N, 3, H, W) in [-1, 1], boxes (B, K, 4) px in them, on the CPU -> both flipped, moved, bent, and
    recoloured."""
    frames, boxes = _geometry(frames, boxes, generator)
    frames = _occlusion(_background(frames, generator), generator)
    frames = _blur(_colour(frames, generator), generator)
    return _jpeg(frames.clamp(-1, 1), generator), boxes


def drift(frames: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """What errors make of a network's own frames over time: contrast, tint, shading astray, too soft or too sharp.

    frames (B, M, 3, H, W), the same for all M of an example; size 0 .. 1.
    """
    batch, count, _, height, width = frames.shape
    if count == 0:  # a network that is told no motion frames
        return frames
    strength = size * _uniform(batch, 0, 1, generator).square()[:, None, None, None]  # many hardly, some badly
    gain = torch.exp(strength * _normal((batch, 1, 1, 1), 0.4, generator)).to(frames)
    tint = _normal((batch, 3, 1, 1), 0.2, generator) + _normal((batch, 3, 6, 6), 0.3, generator)
    softness = (strength * _uniform(batch, -1.5, 1.5, generator)[:, None, None, None]).to(frames)
    shading = F.interpolate((strength * tint).to(frames), (height, width), mode="bilinear").repeat(1, count, 1, 1)
    flat = frames.flatten(1, 2)  # (B, M 3, H, W)
    flat = torch.lerp(flat, box_blur(flat, 5), softness)
    return (flat * gain + shading).clamp(-1, 1).view_as(frames)


def drop_patches(frames: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Holes (zeros) in that share of the examples: up to half of a grid of 8 x 8 patches, the same in all frames.

    frames (B, M, 3, H, W).
    """
    batch, _, _, height, width = frames.shape
    density = 0.5 * _uniform(batch, 0, 1, generator) * _chance(batch, share, generator)
    holes = torch.rand((batch, 1, 8, 8), generator=generator) < density[:, None, None, None]
    return frames * (1 - F.interpolate(holes.to(frames), (height, width)))[:, None]


def box_blur(pictures: Tensor, width: int) -> Tensor:
    """The mean of the odd `width` px square around every pixel, (B, C, H, W); edges are repeated."""
    return F.avg_pool2d(F.pad(pictures, [width // 2] * 4, mode="replicate"), width, stride=1)


def _normal(shape: tuple[int, ...], scale: float, generator: torch.Generator) -> Tensor:
    return scale * torch.randn(shape, generator=generator)


def _uniform(batch: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(batch, generator=generator)


def _chance(batch: int, probability: float, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, generator=generator) < probability


def _some(batch: int, probability: float, generator: torch.Generator) -> Tensor:
    """Which examples something happens to, (b,)."""
    return _chance(batch, probability, generator).nonzero()[:, 0]


def _coordinates(frames: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of every pixel of such frames (..., H, W), (H, W) each, from -1 to 1."""
    x, y = (torch.linspace(-1, 1, frames.shape[side], device=frames.device) for side in (-1, -2))
    return torch.meshgrid(x, y, indexing="xy")


def _geometry(frames: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror, rotate by some degrees, scale, shift, and bend smoothly (another face's proportions)."""
    batch, _, _, height, width = frames.shape
    angle = _normal((batch,), math.radians(3), generator)
    zoom = torch.exp(_normal((batch,), 0.04, generator))
    mirror = torch.where(_chance(batch, 0.5, generator), -1.0, 1.0)
    shift = _normal((batch, 2), 0.025, generator)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    # Where each output pixel comes from: p_in = A p_out + shift, in the [-1, 1] coordinates of grid_sample.
    matrix = torch.stack(
        [torch.stack([cos * mirror, -sin, shift[:, 0]], 1), torch.stack([sin * mirror, cos, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(matrix.to(frames), [batch, 3, height, width], align_corners=False)  # (B, H, W, 2)
    bend = _normal((batch, 2, 4, 4), 0.025, generator).to(frames)
    bend = F.interpolate(bend, (height, width), mode="bicubic", align_corners=True)
    grid = grid + bend.permute(0, 2, 3, 1)
    flat = frames.flatten(1, 2)  # (B, N 3, H, W)
    # Bilinear would leave two thirds of the mouth's sharpness, and the network draws mouths as sharp as it is shown.
    warped = F.grid_sample(flat, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return warped.view_as(frames), _move_boxes(boxes, matrix, width)


def _move_boxes(boxes: Tensor, matrix: Tensor, size: int) -> Tensor:
    """Boxes (B, K, 4) where the inverse of `matrix` (B, 2, 3) carries their centres, as large as before; clipped."""
    begin, end = boxes[..., :2], boxes[..., 2:]
    centre = (begin + end) / size - 1  # (B, K, 2) in [-1, 1]
    moved = torch.linalg.solve(matrix[:, None, :, :2], (centre - matrix[:, None, :, 2])[..., None])[..., 0]
    middle, half = (moved + 1) * size / 2, (end - begin) / 2
    low = (middle - half).round().clamp(0, size - 1)
    high = torch.maximum((middle + half).round().clamp(1, size), low + 1)
    return torch.cat([low, high], -1)


def _background(frames: Tensor, generator: torch.Generator) -> Tensor:
    """In some examples everything beyond the head is another example's, blurred."""
    batch, _, _, height, width = frames.shape
    order = torch.randperm(batch, generator=generator)
    some = _some(batch, 0.25, generator)
    if len(some) == 0:
        return frames
    other, some = frames[order[some].to(frames.device), 0], some.to(frames.device)  # (b, 3, H, W)
    x, y = _coordinates(frames)
    head = torch.sigmoid((1 - torch.hypot(x / 0.75, (y + 0.02) / 1.05)) * 12)  # 1 on the head, which alignment centres
    blurred = F.interpolate(F.interpolate(other, size=6, mode="area"), (height, width), mode="bilinear")
    return frames.index_copy(0, some, torch.lerp(blurred[:, None], frames[some], head))


def _occlusion(frames: Tensor, generator: torch.Generator) -> Tensor:
    """In a few examples something with a soft edge hides a part of the picture, as hands, hair and microphones do."""
    batch, _, _, height, width = frames.shape
    some = _some(batch, 0.08, generator)
    order = torch.randperm(batch, generator=generator)[: len(some)]
    if len(some) == 0:
        return frames
    at_x, at_y = _uniform(2 * len(some), -1, 1, generator).view(2, -1, 1, 1).to(frames)
    radius_x, radius_y = _uniform(2 * len(some), 0.1, 0.5, generator).view(2, -1, 1, 1).to(frames)
    other, some = frames[order.to(frames.device), 0], some.to(frames.device)  # (b, 3, H, W)
    colours = F.interpolate(F.interpolate(other, size=4, mode="area"), (height, width), mode="bicubic")
    x, y = _coordinates(frames)
    inside = 1 - torch.hypot((x - at_x) / radius_x, (y - at_y) / radius_y)  # (b, H, W)
    cover = torch.sigmoid(inside * 12)[:, None, None]
    return frames.index_copy(0, some, torch.lerp(frames[some], colours[:, None], cover))


def _colour(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Gamma, saturation, a mix of the channels, their gain, and lift."""
    batch = len(frames)
    gamma = torch.exp(_normal((batch, 1, 1, 1, 1), 0.2, generator)).to(frames)
    saturation = _uniform(batch, 0.4, 1.5, generator)[:, None, None, None, None].to(frames)
    gain = torch.exp(_normal((batch, 1, 3, 1, 1), 0.07, generator) + _normal((batch, 1, 1, 1, 1), 0.15, generator))
    gain, lift = gain.to(frames), _normal((batch, 1, 1, 1, 1), 0.05, generator).to(frames)
    unit = ((frames + 1) / 2).clamp_(1e-3, 1).pow_(gamma)
    mix = torch.eye(3) + _normal((batch, 3, 3), 0.04, generator)
    mix = (mix / mix.sum(2, keepdim=True)).to(frames)  # white stays white
    unit = torch.einsum("bij,bnjhw->bnihw", mix, unit)
    luma = unit.mean(dim=2, keepdim=True)
    return torch.addcmul(2 * lift - 1, torch.lerp(luma, unit, saturation), 2 * gain)


def _blur(frames: Tensor, generator: torch.Generator) -> Tensor:
    """A slight blur of some examples: photos and clips differ in sharpness."""
    some = _some(len(frames), 0.2, generator)
    amount = _uniform(len(some), 0, 0.6, generator)[:, None, None, None].to(frames)
    some = some.to(frames.device)
    sharp = frames[some].flatten(1, 2)  # (b, N 3, H, W)
    blurred = torch.lerp(sharp, box_blur(sharp, 3), amount)
    return frames.index_copy(0, some, blurred.unflatten(1, frames.shape[1:3]))


def _jpeg(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Some examples as JPEG files would show them: photos have been through one, most often."""
    some = _some(len(frames), 0.15, generator)
    if len(some) == 0:
        return frames
    quality = _uniform(len(some), 40, 95, generator).floor().to(frames)
    some = some.to(frames.device)
    shown = through_jpeg((frames[some] + 1) * 127.5, quality)
    return frames.index_copy(0, some, shown / 127.5 - 1)
