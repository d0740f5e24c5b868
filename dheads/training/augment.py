"""Random changes of colours and content, the same for all frames of an example, so that few faces serve as many.

Pictures may be on any device; random numbers come from a generator on the CPU, so they do not depend on the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dheads.extensions.motion import box_blur, chance, normal, uniform
from dheads.training.jpeg import through_jpeg


def altered(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Change background, colours and sharpness of pictures (B, N, 3, H, W) in [-1, 1], and cover parts of them."""
    frames = _occlusion(_background(frames, generator), generator)
    frames = _blur(_colour(frames, generator), generator)
    return _jpeg(frames.clamp(-1, 1), generator)


def _some(batch: int, probability: float, generator: torch.Generator) -> Tensor:
    """The indices (b,) of the examples chosen with that probability."""
    return chance(batch, probability, generator).nonzero()[:, 0]


def _coordinates(frames: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of every pixel of frames (..., H, W), (H, W) each, from -1 to 1."""
    height, width = frames.shape[-2:]
    x, y = torch.meshgrid(
        torch.linspace(-1, 1, width, device=frames.device),
        torch.linspace(-1, 1, height, device=frames.device),
        indexing="xy",
    )
    return x, y


def _background(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Replace the background of some examples by that of another example, blurred."""
    batch, _, _, height, width = frames.shape
    order = torch.randperm(batch, generator=generator)
    some = _some(batch, 0.25, generator)
    if len(some) == 0:
        return frames
    other, some = frames[order[some].to(frames.device), 0], some.to(frames.device)  # (b, 3, H, W)
    x, y = _coordinates(frames)
    head = torch.sigmoid((1 - torch.hypot(x / 0.75, (y + 0.02) / 1.05)) * 12)  # 1 on the head
    blurred = F.interpolate(F.interpolate(other, size=6, mode="area"), (height, width), mode="bilinear")
    return frames.index_copy(0, some, torch.lerp(blurred[:, None], frames[some], head))


def _occlusion(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Cover a part of some examples by a blurred ellipse, as hands, hair and microphones do."""
    batch, _, _, height, width = frames.shape
    some = _some(batch, 0.08, generator)
    order = torch.randperm(batch, generator=generator)[: len(some)]
    if len(some) == 0:
        return frames
    at_x, at_y = uniform(2 * len(some), -1, 1, generator).view(2, -1, 1, 1).to(frames)
    radius_x, radius_y = uniform(2 * len(some), 0.1, 0.5, generator).view(2, -1, 1, 1).to(frames)
    other, some = frames[order.to(frames.device), 0], some.to(frames.device)  # (b, 3, H, W)
    colours = F.interpolate(F.interpolate(other, size=4, mode="area"), (height, width), mode="bicubic")
    x, y = _coordinates(frames)
    inside = 1 - torch.hypot((x - at_x) / radius_x, (y - at_y) / radius_y)  # (b, H, W)
    cover = torch.sigmoid(inside * 12)[:, None, None]
    return frames.index_copy(0, some, torch.lerp(frames[some], colours[:, None], cover))


def _colour(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Change gamma, saturation, the mixture of the channels, their gain and their offset."""
    batch = len(frames)
    gamma = torch.exp(normal((batch, 1, 1, 1, 1), 0.2, generator)).to(frames)
    saturation = uniform(batch, 0.4, 1.5, generator)[:, None, None, None, None].to(frames)
    gain = torch.exp(normal((batch, 1, 3, 1, 1), 0.07, generator) + normal((batch, 1, 1, 1, 1), 0.15, generator))
    gain, lift = gain.to(frames), normal((batch, 1, 1, 1, 1), 0.05, generator).to(frames)
    unit = ((frames + 1) / 2).clamp_(1e-3, 1).pow_(gamma)
    mix = torch.eye(3) + normal((batch, 3, 3), 0.04, generator)
    mix = (mix / mix.sum(2, keepdim=True)).to(frames)  # white stays white
    unit = torch.einsum("bij,bnjhw->bnihw", mix, unit)
    luma = unit.mean(dim=2, keepdim=True)
    return torch.addcmul(2 * lift - 1, torch.lerp(luma, unit, saturation), 2 * gain)


def _blur(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Blur some examples slightly, as photos and clips differ in sharpness."""
    some = _some(len(frames), 0.2, generator)
    amount = uniform(len(some), 0, 0.6, generator)[:, None, None, None].to(frames)
    some = some.to(frames.device)
    sharp = frames[some].flatten(1, 2)  # (b, N 3, H, W)
    blurred = torch.lerp(sharp, box_blur(sharp, 3), amount)
    return frames.index_copy(0, some, torch.unflatten(blurred, 1, frames.shape[1:3]))


def _jpeg(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Compress some examples as JPEG does, as most photos are JPEG files."""
    some = _some(len(frames), 0.15, generator)
    if len(some) == 0:
        return frames
    quality = uniform(len(some), 40, 95, generator).floor().to(frames)
    some = some.to(frames.device)
    compressed = through_jpeg((frames[some] + 1) * 127.5, quality)
    return frames.index_copy(0, some, compressed / 127.5 - 1)
