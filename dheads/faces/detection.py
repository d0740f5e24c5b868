"""What detectors of faces have in common: a face, squares of a picture to look into, one person over time."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dheads.faces.alignment import apply_transform

MIN_FACE_PX = 32
UNSEEN = np.full((68, 2), np.nan, np.float32)


@dataclass(frozen=True)
class Face:
    landmarks: np.ndarray  # (68, 2) float32 px
    score: float  # 0 to 1
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 px of the whole face


class LandmarkBackend(ABC):
    """A detector of faces and their 68 landmarks."""

    @abstractmethod
    def detect(self, image: np.ndarray) -> list[Face]:
        """The faces of a (H, W, 3) uint8 RGB picture, largest first."""

    def glance(self, image: np.ndarray) -> list[Face]:
        """As `detect`, but for one of many frames: quick, at the price of small faces."""
        return self.detect(image)

    def follow(self, image: np.ndarray, last: Face) -> Face | None:
        """The face of `last`, seen in an earlier frame, in this frame."""
        return same_person(self.glance(image), last)

    def track(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """Landmarks (F, 68, 2) float32 px of one person, the largest face at first; NaN where it is not seen."""
        last: Face | None = None
        rows = []
        for frame in frames:
            face = self.follow(frame, last) if last else same_person(self.glance(frame), None)
            rows.append(face.landmarks if face else UNSEEN)
            last = face or last
        return np.stack(rows) if rows else np.empty((0, 68, 2), np.float32)


@dataclass(frozen=True)
class View:
    """A square of the picture, turned by `angle` (radians, clockwise on the screen)."""

    x: float
    y: float
    side: float
    angle: float = 0.0

    def turned(self, quarters: int) -> View:
        """The same square, turned further by so many quarters."""
        return dataclasses.replace(self, angle=self.angle + quarters * math.pi / 2)

    def enlarged(self, factor: float) -> View:
        """The same square of a picture that is so many times as large."""
        return View(factor * (self.x + 0.5) - 0.5, factor * (self.y + 0.5) - 0.5, factor * self.side, self.angle)

    def matrix(self, size: int) -> np.ndarray:  # (2, 3), picture to view
        c, s = math.cos(self.angle) * size / self.side, math.sin(self.angle) * size / self.side
        m = (size - 1) / 2
        return np.array([[c, s, m - c * self.x - s * self.y], [-s, c, m + s * self.x - c * self.y]])


# ---- Squares of a picture ----


def covering(height: int, width: int, side: float, overlap: float) -> list[View]:
    """Squares that cover the picture. Neighbours share so much that a head cut by one is whole in the next."""
    rows, columns = _steps(height, side, overlap), _steps(width, side, overlap)
    return [View(x, y, side) for y in rows for x in columns]


def _steps(length: int, side: float, overlap: float) -> np.ndarray:
    """The squares' centres along one side."""
    count = 1 + max(0, math.ceil((length - side) / (side - overlap)))
    margin = min(side, length) / 2
    return np.linspace(margin, length - margin, count) - 0.5


# ---- Faces ----


def _centre(face: Face) -> tuple[float, float]:
    x0, y0, x1, y1 = face.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def area(face: Face) -> float:
    x0, y0, x1, y1 = face.box
    return (x1 - x0) * (y1 - y0)


def moved(face: Face, matrix: np.ndarray) -> Face:
    """A face through a transform; its box becomes the landmarks' own."""
    landmarks = apply_transform(matrix, face.landmarks).astype(np.float32)
    box = (*landmarks.min(axis=0).tolist(), *landmarks.max(axis=0).tolist())
    return Face(landmarks, face.score, box)


def same_person(faces: list[Face], last: Face | None) -> Face | None:
    """The face of `last` among those of a later frame: the nearest at the same place; at first the largest."""
    if last is None:
        return max(faces, key=area, default=None)
    near = [face for face in faces if same_place(face, last)]
    return min(near, key=lambda face: math.dist(_centre(face), _centre(last)), default=None)


def same_place(face: Face, last: Face) -> bool:
    """Near enough to be the same person some frames later: less than a face away, of like size."""
    side, last_side = math.sqrt(area(face)), math.sqrt(area(last))
    return 0.5 < side / last_side < 2 and math.dist(_centre(face), _centre(last)) < last_side


def distinct(faces: list[Face]) -> list[Face]:
    """The faces without those that two views saw twice."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: face.score, reverse=True):
        if all(math.dist(_centre(face), _centre(k)) > 0.5 * math.sqrt(max(area(face), area(k))) for k in kept):
            kept.append(face)
    return kept
