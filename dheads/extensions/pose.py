"""The pose code: where the head is, and which way it faces, relative to the photo.

Six numbers a frame, as faces/head_pose.py defines them: the logarithm of a scale, a roll in radians, a shift, a yaw and
a pitch. The first four are a similarity in coordinates from -1 to 1 across the crop. A network that is given them knows
where to move the photo's pixels (warp.py), and in sampling the head moves by chance (head_motion.py).
Why: with every frame aligned to the mean face, heads cannot move. Off: no table extensions.codes.pose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dheads.config import Config
from dheads.extensions.head_motion import HeadMotion, HeadTrack

_USUAL = (0.04, 0.05, 0.05, 0.05, 0.08, 0.05)  # about the standard deviations in clips of people who speak


def relative(pose: Tensor, photo: Tensor) -> Tensor:
    """Poses (..., 6) in a crop -> relative to the photo's pose (..., 6) in the same crop."""
    # S z = a z + b with points as complex numbers: S_pose S_photo^-1 z = a_p / a_i z + (b_p - a_p / a_i b_i)
    turn = _factor(pose) / _factor(photo)
    return _joined(turn, _shift(pose) - turn * _shift(photo), pose[..., 4:] - photo[..., 4:])


def reframed(pose: Tensor, frame: Tensor, mirrored: Tensor) -> Tensor:
    """Relative poses (..., 6) of pictures -> the same in another frame of these pictures.

    frame (..., 6): the similarity from the other frame to this one, after a reflection of x where `mirrored` (...).
    """
    # A^-1 T A z = a z + (a d + b - d) / c with T z = a z + b, A z = c z + d; between reflections conj(a) and -conj(b)
    turn, c, d = _factor(pose), _factor(frame), _shift(frame)
    shift = (turn * d + _shift(pose) - d) / c
    turn, shift = torch.where(mirrored, turn.conj(), turn), torch.where(mirrored, -shift.conj(), shift)
    yaw = torch.where(mirrored, -pose[..., 4], pose[..., 4])
    return _joined(turn, shift, torch.stack([yaw, pose[..., 5]], -1))


def composed(outer: Tensor, inner: Tensor) -> Tensor:
    """The similarity (..., 6) that first does `inner` and then `outer`, (..., 6) each; its yaw and pitch are 0."""
    shift = _factor(outer) * _shift(inner) + _shift(outer)
    return _joined(_factor(outer) * _factor(inner), shift, torch.zeros_like(inner[..., 4:]))


def undone(pose: Tensor, points: Tensor) -> Tensor:
    """Points (..., 2) of a moved head -> where they are in the photo: S^-1 of a pose that broadcasts, (..., 6)."""
    # S^-1 z = (z - b) / a = e^-s R(-roll) (z - b)
    x, y = (points - pose[..., 2:4]).unbind(-1)
    size = torch.exp(-pose[..., 0])
    cos, sin = size * torch.cos(pose[..., 1]), size * torch.sin(pose[..., 1])
    return torch.stack([cos * x + sin * y, cos * y - sin * x], -1)


def done(pose: Tensor, points: Tensor) -> Tensor:
    """The inverse of `undone`: points (..., 2) of the photo -> where a pose (..., 6) moves them."""
    x, y = points.unbind(-1)
    size = torch.exp(pose[..., 0])
    cos, sin = size * torch.cos(pose[..., 1]), size * torch.sin(pose[..., 1])
    return torch.stack([cos * x - sin * y, cos * y + sin * x], -1) + pose[..., 2:4]


def _factor(pose: Tensor) -> Tensor:
    return torch.polar(pose[..., 0].exp(), pose[..., 1])


def _shift(pose: Tensor) -> Tensor:
    return torch.complex(pose[..., 2], pose[..., 3])


def _joined(factor: Tensor, shift: Tensor, turned: Tensor) -> Tensor:
    """The inverse of `_factor` and `_shift`, with yaw and pitch (..., 2)."""
    parts = [factor.abs().log(), factor.angle(), shift.real, shift.imag]
    return torch.cat([torch.stack(parts, -1), turned], -1)


class PoseCode:
    """See the module's docstring."""

    name, embedding, dims = "pose", "pose_embed", 6
    usual: Sequence[float] = _USUAL
    is_heard, begins_at_zero = False, True
    points = range(68)

    def measured(self, labels: Mapping[str, Tensor]) -> Tensor:
        return labels["pose"]

    def events(self, code: Tensor) -> list[int]:
        return []

    def fitted(self, config: Config) -> HeadMotion:
        return HeadMotion(config.conditioning.speech_dim)

    def normalised(self, code: Tensor, fitted: nn.Module | None) -> Tensor:
        return code

    def track(self, fitted: nn.Module | None, seed: int, event_rate: float) -> HeadTrack:
        assert isinstance(fitted, HeadMotion)
        return fitted.track(seed)
