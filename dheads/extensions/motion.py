"""Motion frames altered on purpose, in training and in sampling, so that errors of generated frames do not accumulate.

In training they drift, have holes and noise; in sampling they may have noise, and each is anchored to the identity;
in both the mouth may be blanked.
Why: errors of generated frames are smooth changes of contrast, tint and sharpness, which accumulate: without these,
edges break up within some 30 frames. With a mouth to copy in them, lips follow the frames before and not the sound.
Off: all of extensions.motion at its defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dheads.conditioning import Condition, Cues
from dheads.config import Config
from dheads.extensions.copying import mouth_mask
from dheads.extensions.eyes import EyeCode, blinking
from dheads.extensions.pose import PoseCode
from dheads.extensions.warp import MovedPhoto, moved_grid, moved_photo, sampled


@dataclass(frozen=True, eq=False)
class MotionCondition(Condition):
    """A condition with motion frames as altered, the noise level that the network is given, and the photo moved."""

    motion_noise: Tensor | None = None  # (B,) standard deviation of the noise on the motion frames
    photo: MovedPhoto | None = None


def condition_with(
    config: Config,
    identity: Tensor,
    motion_frames: Tensor,
    cues: Cues,
    level: Tensor | None = None,
    eps: Tensor | None = None,
    favour: float = 0.0,
) -> MotionCondition:
    """The condition of clean frames in [-1, 1]: noise is added to the motion frames, then their mouths are blanked.

    identity (B, 3, H, W), motion_frames (B, M, 3, H, W). level (B,): standard deviation of the noise; eps: standard
    normal, like motion_frames. Networks that are given a noise level get 0 where there is none.
    favour: of the photo where it is moved (warp.py).
    """
    motion, photo = config.extensions.motion, None
    if config.extensions.warp.flow:
        photo = moved_photo(config, identity, pose_of(config, cues), favour, blink_of(config, cues))
    if level is not None and eps is not None:
        motion_frames = motion_frames + level[:, None, None, None, None] * eps
    if motion.hide_mouth:
        size = identity.shape[-1]
        mask = mouth_mask(config.alignment, size, identity.device) if photo is None else photo.mask[:, None]
        motion_frames = motion_frames * (1 - mask)
    if motion.noise > 0 and level is None:
        level = identity.new_zeros(identity.shape[0])
    return MotionCondition(identity, motion_frames, cues, level, photo)


def pose_of(config: Config, cues: Cues) -> Tensor:
    """The frame's own pose, (B, 6)."""
    return cues.codes[PoseCode.name][:, config.extensions.codes[PoseCode.name].context]


def blink_of(config: Config, cues: Cues) -> Tensor | None:
    """How far the eyes of the frame blink, (B,) 0 .. 1; None without an eye code."""
    if (code := cues.codes.get(EyeCode.name)) is None:
        return None
    return blinking(code[:, config.extensions.codes[EyeCode.name].context, 0])


def anchored(config: Config, frames: Tensor, identity: Tensor, pose: Tensor | None) -> Tensor:
    """Frames with the share extensions.motion.anchor of the identity, moved by the frames' pose where there is one.

    frames, identity (B, 3, H, W); pose (B, 6).
    """
    share = config.extensions.motion.anchor
    if share == 0:
        return frames
    photo = identity if pose is None else sampled(identity, moved_grid(identity, pose))
    return torch.lerp(frames, photo, share)


def as_motion_frame(config: Config, frame: Tensor, identity: Tensor, cues: Cues) -> Tensor:
    """A finished frame (B, 3, H, W) as the following ones see it."""
    return anchored(config, frame, identity, pose_of(config, cues) if config.extensions.warp.flow else None)


def rested(frame: Tensor, motion_frames: Tensor, rest: float) -> Tensor:
    """A motion frame (B, 3, H, W) in a pause of that degree, 0 .. 1; motion_frames (B, M, 3, H, W) are those before.

    Half of the last one is blended in: in a pause frames that respond to one another would oscillate.
    """
    return torch.lerp(frame, motion_frames[:, -1], rest / 2) if rest and motion_frames.shape[1] else frame


def spoiled(config: Config, motion_frames: Tensor, generator: torch.Generator) -> Tensor:
    """Motion frames (B, M, 3, H, W) of training examples, with drift and holes."""
    motion = config.extensions.motion
    if motion.drift > 0:
        motion_frames = drift(motion_frames, motion.drift, generator)
    if motion.holes > 0:
        motion_frames = punch_holes(motion_frames, motion.holes, generator)
    return motion_frames


def drift(frames: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Change frames as errors change a network's own over time: contrast, tint, shading, too soft or too sharp.

    frames (B, M, 3, H, W), the same for all M of an example; size 0 .. 1.
    """
    batch, count, _, height, width = frames.shape
    if count == 0:  # a network without motion frames
        return frames
    strength = size * uniform(batch, 0, 1, generator).square()[:, None, None, None]  # many hardly, some badly
    gain = torch.exp(strength * normal((batch, 1, 1, 1), 0.4, generator)).to(frames)
    tint = normal((batch, 3, 1, 1), 0.2, generator) + normal((batch, 3, 6, 6), 0.3, generator)
    softness = (strength * uniform(batch, -1.5, 1.5, generator)[:, None, None, None]).to(frames)
    shading = F.interpolate((strength * tint).to(frames), (height, width), mode="bilinear").repeat(1, count, 1, 1)
    flat = frames.flatten(1, 2)  # (B, M 3, H, W)
    flat = torch.lerp(flat, box_blur(flat, 5), softness)
    return (flat * gain + shading).clamp(-1, 1).view_as(frames)


def punch_holes(frames: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Set holes to zero in that share of the examples: up to half of a grid of 8 x 8 patches, the same in all frames.

    frames (B, M, 3, H, W).
    """
    batch, _, _, height, width = frames.shape
    density = 0.5 * uniform(batch, 0, 1, generator) * chance(batch, share, generator)
    holes = torch.rand((batch, 1, 8, 8), generator=generator) < density[:, None, None, None]
    return frames * (1 - F.interpolate(holes.to(frames), (height, width)))[:, None]


def box_blur(pictures: Tensor, width: int) -> Tensor:
    """The mean of the odd `width` px square around every pixel, (B, C, H, W); edges are repeated."""
    return F.avg_pool2d(F.pad(pictures, [width // 2] * 4, mode="replicate"), width, stride=1)


def normal(shape: tuple[int, ...], scale: float, generator: torch.Generator) -> Tensor:
    """Normal numbers of that standard deviation."""
    return scale * torch.randn(shape, generator=generator)


def uniform(batch: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Numbers between low and high, (B,)."""
    return low + (high - low) * torch.rand(batch, generator=generator)


def chance(batch: int, probability: float, generator: torch.Generator) -> Tensor:
    """True with that probability, (B,)."""
    return torch.rand(batch, generator=generator) < probability
