"""Head motion and blinks of a video, for another face to repeat."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dheads.config import FPS, Config
from dheads.errors import DheadsError
from dheads.extensions.eyes import eye_code
from dheads.extensions.pose import relative
from dheads.faces.alignment import align_transforms, apply_transform, fill_gaps
from dheads.faces.detection import LandmarkBackend
from dheads.faces.eyelids import eye_openness, without_gaps
from dheads.faces.head_pose import head_pose
from dheads.media.reading import read_frames

_LEAST_FRAMES, _MOST_FRAMES = 10 * FPS, 300 * FPS  # of a video that are looked at; few have no middle
_BEGIN = FPS  # frames in which the head goes over from the photo's pose to the video's
_LEAST_SEEN = 0.5  # share of the frames that must show a face


class Repeated:
    """A code of given frames that goes on back and forth for as long as the video lasts."""

    reach = 0

    def __init__(self, code: Tensor) -> None:
        """code (F, C), normalised."""
        self._code = code

    def window(self, frame: int, speech: Tensor, at: int, context: int) -> Tensor:
        last = len(self._code) - 1
        frames = torch.arange(frame - context, frame + context + 1).clamp(min=0)
        # A triangle wave: 0 .. last .. 0
        return self._code[last - (frames % max(1, 2 * last) - last).abs()]


def motion_of(video: Path, config: Config, backend: LandmarkBackend, frames: int | None) -> dict[str, Tensor]:
    """The codes of a video's head by name, as measured: pose (F, 6) and eyes (F, 1).

    Poses are relative to their median, and begin at the photo's own. frames: how many are needed; None: unknown.
    Raises DheadsError for a file that is no video of one face.
    """
    count = max(_LEAST_FRAMES, min(frames or _MOST_FRAMES, _MOST_FRAMES))
    landmarks = backend.track(islice(read_frames(video), count))
    seen = np.isfinite(landmarks).all(axis=(1, 2))
    if len(seen) < 2:
        raise DheadsError(f"{video} is a single picture, so no head moves in it; give a video")
    if seen.mean() < _LEAST_SEEN:
        raise DheadsError(
            f"{video}: a face is found in {seen.mean():.0%} of its frames; give a video that shows one face from the "
            "front or half from the side throughout"
        )
    openness = torch.from_numpy(without_gaps(eye_openness(islice(read_frames(video), count), landmarks)))
    return {"pose": _poses(fill_gaps(landmarks, len(landmarks)), config), "eyes": eye_code(openness)}


def _poses(landmarks: np.ndarray, config: Config) -> Tensor:
    size = config.network.image_size
    matrices = align_transforms(landmarks, config.alignment, size)
    aligned = np.stack([apply_transform(*pair) for pair in zip(matrices, landmarks, strict=True)])
    poses = torch.from_numpy(head_pose(aligned, config.alignment, size))
    u = (torch.arange(len(poses)) / _BEGIN).clamp(max=1)[:, None]
    # From 0 to 1 with slope 0 at both
    return u * u * (3 - 2 * u) * relative(poses, poses.median(0).values)
