"""What the network is told besides x_t: the identity, motion frames, the audio window, the lip code.

The only home of the edge rules: motion frames before the first frame are copies of the identity (paper section 3.2),
and embeddings are repeated at both ends of the recording (section 3.4). Training and sampling both come here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dheads.config import AlignmentConfig, Config


@dataclass(frozen=True)
class Condition:
    """One frame's conditioning for a batch, as the network takes it."""

    identity: Tensor  # (B, 3, H, W)
    motion_frames: Tensor  # (B, M, 3, H, W), oldest first; mouths hidden and noised where the config says so
    audio_window: Tensor  # (B, A, D)
    lip_window: Tensor | None = None  # (B, A', L)
    motion_noise: Tensor | None = None  # (B,) standard deviation of the noise on the motion frames
    mouth_mask: Tensor | None = None  # (1, 1, H, W): 1 where the mouth and the chin may move
    eye_window: Tensor | None = None  # (B, A'', 1)

    def heard(self, which: Tensor) -> Condition:
        """The same without sound where `which` (B,) is 0, neither as embeddings nor as lip code: the null of guidance,
        and of training, which teaches it."""
        which = which.to(self.audio_window)[:, None, None]
        lips = None if self.lip_window is None else self.lip_window * which
        return replace(self, audio_window=self.audio_window * which, lip_window=lips)

    def without_audio(self) -> Condition:
        """The same without any sound."""
        return self.heard(torch.zeros(len(self.identity), device=self.identity.device))

    def joined(self, other: Condition) -> Condition:
        """Both in one batch. The mouth mask is the same for all."""

        def cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b])

        return Condition(
            torch.cat([self.identity, other.identity]),
            torch.cat([self.motion_frames, other.motion_frames]),
            torch.cat([self.audio_window, other.audio_window]),
            cat(self.lip_window, other.lip_window),
            cat(self.motion_noise, other.motion_noise),
            self.mouth_mask,
            cat(self.eye_window, other.eye_window),
        )


def build(
    config: Config,
    identity: Tensor,
    motion_frames: Tensor,
    audio_window: Tensor,
    lip_window: Tensor | None = None,
    motion_noise: Tensor | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    eye_window: Tensor | None = None,
) -> Condition:
    """Conditioning from clean frames in [-1, 1]: noises the motion frames, then hides their mouths.

    identity (B, 3, H, W), motion_frames (B, M, 3, H, W), audio_window (B, A, D), lip_window (B, A', L),
    motion_noise (B,), noise like motion_frames (standard normal), eye_window (B, A'', 1). mask: what `mouth_mask_for`
    made, if kept.
    """
    told = config.conditioning
    if mask is None:
        mask = mouth_mask_for(config, identity)
    if motion_noise is not None and noise is not None:
        motion_frames = motion_frames + motion_noise[:, None, None, None, None] * noise
    if told.hide_motion_mouth and mask is not None:
        motion_frames = motion_frames * (1 - mask)
    if told.motion_noise > 0 and motion_noise is None:
        motion_noise = identity.new_zeros(identity.shape[0])
    return Condition(identity, motion_frames, audio_window, lip_window, motion_noise, mask, eye_window)


def mouth_mask_for(config: Config, like: Tensor) -> Tensor | None:
    """The mask (1, 1, H, W) for pictures like these (..., H, W), where the model uses one."""
    if config.conditioning.hide_motion_mouth or config.model.copy_gates:
        return mouth_mask(config.alignment, like.shape[-1]).to(like)
    return None


def mouth_mask(alignment: AlignmentConfig, size: int) -> Tensor:
    """(1, 1, H, W) in [0, 1]: an ellipse around the mean face's mouth and chin, with a soft edge."""
    d = alignment.eye_distance
    x, y = torch.meshgrid((torch.arange(size) + 0.5) / size, (torch.arange(size) + 0.5) / size, indexing="xy")
    centre_y, radius_x, radius_y, edge = alignment.eye_y + 1.28 * d, 0.72 * d, 0.60 * d, 0.2
    radius = torch.hypot((x - 0.5) / radius_x, (y - centre_y) / radius_y)  # 1 on the ellipse
    return ((1 + edge / 2 - radius) / edge).clamp(0, 1)[None, None]


def window(embeddings: Tensor, frame: int | Tensor, context: int) -> Tensor:
    """y_Motion^(k) = y^(k-m) .. y^(k+m), ends repeated (paper section 3.4).

    embeddings (F, D), frame an index or (B,) indices -> (2m+1, D) or (B, 2m+1, D).
    """
    frame = torch.as_tensor(frame)
    index = frame[..., None] + torch.arange(-context, context + 1)
    return embeddings[index.clamp(0, len(embeddings) - 1)]


def motion_indices(frame: int, count: int) -> list[int | None]:
    """The `count` frames before `frame`, oldest first; None stands for the identity (paper section 3.2)."""
    return [k if k >= 0 else None for k in range(frame - count, frame)]


class MotionBuffer:
    """The last M frames while sampling; starts as copies of the identity (paper section 3.5)."""

    def __init__(self, identity: Tensor, count: int, anchor: float = 0.0) -> None:
        """identity (B, 3, H, W); anchor: its share in every pushed frame, so that errors fade (beyond the paper)."""
        self._identity, self._anchor = identity, anchor
        self._frames = identity[:, None].repeat(1, count, 1, 1, 1)  # (B, M, 3, H, W)

    def push(self, frame: Tensor, rest: float = 0.0) -> None:
        """Take the finished frame in, (B, 3, H, W), and forget the oldest.

        rest: how far the face rests, 0 .. 1. Then half of the last frame is blended in (beyond the paper): frames that
        answer one another would sway to and fro.
        """
        anchored = torch.lerp(frame, self._identity, self._anchor)
        if rest and self._frames.shape[1]:
            anchored = torch.lerp(anchored, self._frames[:, -1], rest / 2)
        self._frames = torch.cat([self._frames, anchored[:, None]], dim=1)[:, 1:]

    def stacked(self) -> Tensor:
        """(B, M, 3, H, W), oldest first."""
        return self._frames


def grayscale(frames: Tensor) -> Tensor:
    """(..., 3, H, W) -> (..., 1, H, W), ITU-R 601 luma."""
    red, green, blue = frames.split(1, dim=-3)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def network_input(config: Config, x_t: Tensor, condition: Condition) -> Tensor:
    """x_In = x_t (+) motion frames (oldest first) (+) x_Id on channels, as the released network orders them."""
    motion = condition.motion_frames  # (B, M, 3, H, W)
    if config.conditioning.grayscale_motion:
        motion = grayscale(motion)
    return torch.cat([x_t, motion.flatten(1, 2), condition.identity], dim=1)


def input_channels(config: Config) -> int:
    """Channels of `network_input`."""
    told = config.conditioning
    return 3 + told.motion_frames * (1 if told.grayscale_motion else 3) + 3


def blend_copies(x_0: Tensor, gates: Tensor, condition: Condition) -> Tensor:
    """Beyond the paper: x_0 = g_0 x_0 + g_1 x^(k-1) + g_2 x_Id with g = softmax(0, a, b), none inside the mouth mask.

    x_0 (B, 3, H, W) is the network's own; gates (B, 2, H, W) are its logits a and b.
    """
    weights = F.softmax(F.pad(gates, (0, 0, 0, 0, 1, 0)), dim=1)  # (B, 3, H, W)
    copies = weights[:, 1:2] * condition.motion_frames[:, -1] + weights[:, 2:3] * condition.identity
    blended = weights[:, :1] * x_0 + copies
    if condition.mouth_mask is None:
        return blended
    return torch.lerp(blended, x_0, condition.mouth_mask)
