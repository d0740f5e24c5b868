"""What the network is given besides x_t: the identity, motion frames and the audio window (paper sections 3.2 and 3.4).

The only home of the edge rules: motion frames before the first frame are copies of the identity (paper section 3.2),
and embeddings are repeated at both ends of the recording (section 3.4). Training and sampling both come here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dheads.config import Config


@dataclass(frozen=True, eq=False)
class Cues:
    """What goes with a frame, for a batch: the audio window and, beyond the paper, further codes by name."""

    audio_window: Tensor  # (B, A, D)
    codes: Mapping[str, Tensor] = field(default_factory=dict)  # (B, 2 context + 1, C) each

    def map(self, change: Callable[[Tensor], Tensor]) -> Cues:
        """The same with every tensor changed alike."""
        return Cues(change(self.audio_window), {name: change(code) for name, code in self.codes.items()})

    def to(self, device: torch.device) -> Cues:
        return self.map(lambda value: value.to(device))

    def __getitem__(self, index: int | slice | Tensor | tuple[int | slice | Tensor, ...]) -> Cues:
        """The same part of every tensor."""
        return self.map(lambda value: value[index])

    @staticmethod
    def cat(several: Sequence[Cues]) -> Cues:
        """Several batches as one; all have the same codes."""
        codes = {name: torch.cat([cues.codes[name] for cues in several]) for name in several[0].codes}
        return Cues(torch.cat([cues.audio_window for cues in several]), codes)


@dataclass(frozen=True, eq=False)
class Condition:
    """What the network is given of one frame, for a batch."""

    identity: Tensor  # (B, 3, H, W)
    motion_frames: Tensor  # (B, M, 3, H, W), oldest first
    cues: Cues


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

    def __init__(self, identity: Tensor, count: int) -> None:
        """identity (B, 3, H, W)."""
        self._frames = identity[:, None].repeat(1, count, 1, 1, 1)  # (B, M, 3, H, W)

    def push(self, frame: Tensor) -> None:
        """Take in the finished frame (B, 3, H, W), and forget the oldest."""
        self._frames = torch.cat([self._frames, frame[:, None]], dim=1)[:, 1:]

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
    cond = config.conditioning
    return 3 + cond.motion_frames * (1 if cond.grayscale_motion else 3) + 3
