"""Parts that all face detectors share: faces, square views of a picture, and the tracking of one person."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dheads.faces.alignment import apply_transform, scale_points

MIN_FACE_PX = 32
UNSEEN = np.full((68, 2), np.nan, np.float32)  # landmarks of a face that is not seen


@dataclass(frozen=True)
class Face:
    """A detected face."""

    landmarks: np.ndarray  # (68, 2) float32 px
    score: float  # 0 to 1
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 px of the whole face


class LandmarkBackend(ABC):
    """A detector of faces and their 68 landmarks."""

    @abstractmethod
    def detect(self, image: np.ndarray) -> list[Face]:
        """The faces in a picture (H, W, 3) uint8 RGB, largest first."""

    def glance(self, image: np.ndarray) -> list[Face]:
        """As `detect`, for one of many frames: faster, but it can miss small faces."""
        return self.detect(image)

    def follow(self, image: np.ndarray, last: Face) -> Face | None:
        """The face in this frame of the person who had the face `last` in an earlier one; None if it is not seen."""
        return same_person(self.glance(image), last)

    def track(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """Landmarks (F, 68, 2) float32 px of one person, the largest face when first seen; NaN where it is not seen."""
        last: Face | None = None
        rows = []
        for frame in frames:
            face = self.follow(frame, last) if last else same_person(self.glance(frame), None)
            rows.append(face.landmarks if face else UNSEEN)
            last = face or last
        return np.stack(rows) if rows else np.empty((0, 68, 2), np.float32)


@dataclass(frozen=True)
class View:
    """A square part of a picture, turned about its centre."""

    x: float  # centre, px
    y: float
    side: float  # px
    angle: float = 0.0  # radians, clockwise on the screen

    def turned(self, quarters: int) -> View:
        """The same square, turned by further quarter turns."""
        return dataclasses.replace(self, angle=self.angle + quarters * math.pi / 2)

    def enlarged(self, factor: float) -> View:
        """The same square in the picture made `factor` times as large."""
        x, y = scale_points(np.array([self.x, self.y]), factor).tolist()
        return View(x, y, factor * self.side, self.angle)

    def matrix(self, size: int) -> np.ndarray:
        """The transform (2, 3) from the picture to a crop of `size` px that shows this view."""
        c, s = math.cos(self.angle) * size / self.side, math.sin(self.angle) * size / self.side
        centre = (size - 1) / 2
        return np.array([[c, s, centre - c * self.x - s * self.y], [-s, c, centre + s * self.x - c * self.y]])


# ---- Squares of a picture ----


def covering(height: int, width: int, side: float, overlap: float) -> list[View]:
    """Views of `side` px that cover a picture of `height` x `width` px, neighbours sharing at least `overlap` px."""
    rows, columns = _steps(height, side, overlap), _steps(width, side, overlap)
    return [View(x, y, side) for y in rows for x in columns]


def _steps(length: int, side: float, overlap: float) -> np.ndarray:
    """The centres of the views along one side of `length` px."""
    count = 1 + max(0, math.ceil((length - side) / (side - overlap)))
    margin = min(side, length) / 2
    return np.linspace(margin, length - margin, count) - 0.5


# ---- Faces ----


def _centre(face: Face) -> tuple[float, float]:
    x0, y0, x1, y1 = face.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def area(face: Face) -> float:
    """The area of a face's box, px^2."""
    x0, y0, x1, y1 = face.box
    return (x1 - x0) * (y1 - y0)


def moved(face: Face, matrix: np.ndarray) -> Face:
    """A face mapped by a transform (2, 3); its box becomes that of its landmarks."""
    landmarks = apply_transform(matrix, face.landmarks).astype(np.float32)
    box = (*landmarks.min(axis=0).tolist(), *landmarks.max(axis=0).tolist())
    return Face(landmarks, face.score, box)


def same_person(faces: list[Face], last: Face | None) -> Face | None:
    """The face of a later frame that is at the place of `last`, the nearest of several; without `last`, the largest."""
    if last is None:
        return max(faces, key=area, default=None)
    near = [face for face in faces if same_place(face, last)]
    return min(near, key=lambda face: math.dist(_centre(face), _centre(last)), default=None)


def same_place(face: Face, last: Face) -> bool:
    """Whether two faces can be one person's in frames close in time: less than a face apart, of similar size."""
    side, last_side = math.sqrt(area(face)), math.sqrt(area(last))
    return 0.5 < side / last_side < 2 and math.dist(_centre(face), _centre(last)) < last_side


def distinct(faces: list[Face]) -> list[Face]:
    """The faces without duplicates from overlapping views; of each, the one of the highest score is kept."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: face.score, reverse=True):
        if all(math.dist(_centre(face), _centre(k)) > 0.5 * math.sqrt(max(area(face), area(k))) for k in kept):
            kept.append(face)
    return kept
