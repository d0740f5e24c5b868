"""The frame of pictures in training: mirrored, turned, scaled, shifted and bent, with all that is measured in them.

Coordinates run from -1 to 1 across a picture, about its centre.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dheads.extensions.motion import chance, normal
from dheads.extensions.pose import composed, done, reframed, undone


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the points p' of new pictures come from: p = S M p' + bend(p'), M a reflection of x."""

    frame: Tensor  # (B, 6), the similarity S as a pose
    mirrored: Tensor  # (B,) bool, where M is not the identity
    bend: Tensor | None = None  # (B, 2, H, W)

    @staticmethod
    def none(batch: int, device: torch.device | str = "cpu") -> Geometry:
        """Leaves pictures as they are."""
        return Geometry(torch.zeros(batch, 6, device=device), torch.zeros(batch, dtype=torch.bool, device=device))

    @staticmethod
    def random(batch: int, size: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Geometry:
        """Mirrors, rotates by some degrees, scales, shifts, and bends smoothly, as if to another face's proportions.

        generator: on the CPU, so that the numbers do not depend on the device.
        """
        angle = normal((batch,), math.radians(3), generator)
        zoom = normal((batch,), 0.04, generator)
        mirrored = chance(batch, 0.5, generator)
        shift = normal((batch, 2), 0.025, generator)
        bend = normal((batch, 2, 4, 4), 0.025, generator).to(device)
        bend = F.interpolate(bend, (size, size), mode="bicubic", align_corners=True)
        frame = torch.stack([-zoom, angle, shift[:, 0], shift[:, 1], torch.zeros(batch), torch.zeros(batch)], 1)
        return Geometry(frame.to(device), mirrored.to(device), bend)

    def about(self, pose: Tensor) -> Geometry:
        """The same after pictures are framed so that a head of that pose (B, 6) is where the mean face is."""
        return replace(self, frame=composed(pose, self.frame))

    def pictures(self, frames: Tensor) -> Tensor:
        """Frames (B, N, 3, H, W), the N of an example alike."""
        batch, _, channels, height, width = frames.shape
        grid = F.affine_grid(self._matrix(), [batch, channels, height, width], align_corners=False)  # (B, H, W, 2)
        if self.bend is not None:
            grid = grid + self.bend.permute(0, 2, 3, 1)
        # Bilinear sampling would keep two thirds of the mouth's sharpness, and generated mouths are as sharp as these.
        flat = frames.flatten(1, 2)  # (B, N 3, H, W)
        warped = F.grid_sample(flat, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
        return warped.view_as(frames)

    def boxes(self, boxes: Tensor, size: int) -> Tensor:
        """Boxes (B, K, 4) half-open px with their centres moved, clipped to the picture; their size stays."""
        begin, end = boxes[..., :2], boxes[..., 2:]
        moved = self._backwards((begin + end) / size - 1)  # (B, K, 2)
        middle, half = (moved + 1) * size / 2, (end - begin) / 2
        low = (middle - half).round().clamp(0, size - 1)
        high = torch.maximum((middle + half).round().clamp(1, size), low + 1)
        return torch.cat([low, high], -1)

    def points(self, points: Tensor) -> Tensor:
        """Points (B, P, 2): where they are in the new pictures."""
        moved = self._backwards(points)
        if self.bend is None:
            return moved
        for _ in range(4):  # p' = M S^-1 (p - bend(p')); the bend changes slowly, so this converges
            bend = F.grid_sample(self.bend, moved[:, None], padding_mode="border", align_corners=False)[:, :, 0]
            moved = self._backwards(points - bend.transpose(1, 2))
        return moved

    def poses(self, poses: Tensor) -> Tensor:
        """Relative poses (B, ..., 6); the bend does not count."""
        lead = [1] * (poses.ndim - 2)
        mirrored = self.mirrored.view(-1, *lead).expand(poses.shape[:-1])
        return reframed(poses, self.frame.view(-1, *lead, 6), mirrored)

    def _matrix(self) -> Tensor:
        """S M as (B, 2, 3)."""
        corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], device=self.frame.device)
        origin, x, y = done(self.frame[:, None], corners).unbind(1)  # (B, 2) each
        mirror = torch.where(self.mirrored, -1.0, 1.0)[:, None]
        return torch.stack([mirror * (x - origin), y - origin, origin], -1)

    def _backwards(self, points: Tensor) -> Tensor:
        """M S^-1 of points (B, P, 2)."""
        x, y = undone(self.frame[:, None], points).unbind(-1)
        return torch.stack([torch.where(self.mirrored[:, None], -x, x), y], -1)
