"""One person's face throughout a video: frames, which are decoded once if they fit into memory, and landmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from dheads.config import AlignmentConfig
from dheads.errors import DheadsError
from dheads.faces.alignment import align_transforms, apply_transform, eye_distance, scale_points, warp
from dheads.faces.detection import LandmarkBackend
from dheads.media.reading import read_frames

MAX_MISSING = 0.2  # share of the frames that may lack a face
_CACHE_BYTES = 2**29  # of decoded frames; a longer video is decoded again each time it is read
_ALIGNMENT = AlignmentConfig()
Read = Callable[[], Iterable[np.ndarray]]  # starts a video from its first frame: (H, W, 3) uint8 RGB frames


@dataclass(frozen=True)
class Footage:
    """One person's face throughout a video.

    Raises DheadsError for a video without frames, or if more than a fifth of them lack a face.
    """

    name: str  # for messages
    read: Read
    landmarks: np.ndarray  # (F, 68, 2) px; NaN in frames without a face
    eye_distance: float  # median over the frames, px
    side: int  # longer side of the frames, px

    def __post_init__(self) -> None:
        missing = len(self.landmarks) - int(self.seen.sum())
        if missing > MAX_MISSING * len(self.landmarks) or not len(self.landmarks):
            raise DheadsError(f"{self.name}: no face in {missing} of {len(self.landmarks)} frames")

    @property
    def seen(self) -> np.ndarray:
        """(F,) bool: the frames that show a face."""
        return has_face(self.landmarks)


def has_face(landmarks: np.ndarray) -> np.ndarray:
    """(F,) bool for landmarks (F, 68, 2): the frames whose landmarks are finite."""
    seen: np.ndarray = np.isfinite(landmarks).all(axis=(1, 2))
    return seen


class Recording:
    """A video file that can be read repeatedly: each call yields its (H, W, 3) uint8 RGB frames at 25 fps."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._frames: list[np.ndarray] | None = None

    def __reduce__(self) -> tuple[type[Recording], tuple[Path]]:
        return Recording, (self._path,)  # pickled without its frames

    def __call__(self) -> Iterator[np.ndarray]:
        if self._frames is not None:
            yield from self._frames
            return
        kept: list[np.ndarray] = []
        room = _CACHE_BYTES
        for frame in read_frames(self._path):
            room -= frame.nbytes
            if room >= 0:
                kept.append(frame)
            else:
                kept.clear()
            yield frame
        if room >= 0:
            self._frames = kept


def track_face(name: str, read: Read, backend: LandmarkBackend) -> Footage:
    """Track the largest face of a video. Raises DheadsError as `Footage` does."""
    sides: list[int] = []

    def measured() -> Iterator[np.ndarray]:
        for frame in read():
            sides.append(max(frame.shape[:2]))
            yield frame

    landmarks = backend.track(measured())
    distances = eye_distance(landmarks[has_face(landmarks)])
    return Footage(name, read, landmarks, float(np.median(distances)) if len(distances) else 0.0, max(sides, default=0))


def shortened(video: Footage, count: int) -> Footage:
    """The first `count` frames of a video."""
    return replace(video, read=partial(_first, video.read, count), landmarks=video.landmarks[:count])


def _first(read: Read, count: int) -> Iterator[np.ndarray]:
    return islice(read(), count)


def resized(video: Footage, side: int) -> Footage:
    """The video with a longer side of `side` px, resampled by area averaging."""
    factor = side / video.side
    # Lengths count from the picture's edge, points from the centre of its first pixel.
    points = scale_points(video.landmarks, factor)
    return Footage(video.name, partial(_scaled, video.read, factor), points, video.eye_distance * factor, side)


def _scaled(read: Read, factor: float) -> Iterator[np.ndarray]:
    for frame in read():
        yield cv2.resize(frame, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def crop_side(scale: float) -> int:
    """The side in px of an aligned crop in which the eyes are `scale` px apart."""
    return max(16, round(scale / _ALIGNMENT.eye_distance))


def aligned(video: Footage, scale: float) -> tuple[np.ndarray, Iterator[np.ndarray | None]]:
    """Aligned crops (S, S, 3) uint8 in which the eyes are `scale` px apart, S = `crop_side(scale)`.

    Returns the landmarks (F, 68, 2) in px of the crops, NaN in frames without a face, and the crops, None there.
    """
    size = crop_side(scale)
    matrices = align_transforms(video.landmarks, _ALIGNMENT, size)
    points = np.stack([apply_transform(matrix, row) for matrix, row in zip(matrices, video.landmarks, strict=True)])
    crops = (
        warp(frame, matrix, size) if np.isfinite(matrix).all() else None
        for frame, matrix in zip(video.read(), matrices, strict=True)
    )
    return points, crops
