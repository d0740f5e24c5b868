"""The eyes' openness by MediaPipe's iris network, which sees each eye enlarged and so follows the lids better than
the face mesh.

From a crop of 64 px the network (Ablavatski et al. 2020, arXiv 2006.11341) gives 71 points of the eye and its
surroundings; the first 16 are the outline of the lids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache

import numpy as np

from dheads.faces.alignment import warp
from dheads.faces.detection import View
from dheads.faces.litert import FaceNet

_PX = 64
_SCALE = 2.3  # the crop's side, in widths of the eye
# Landmarks of the corners of the person's right and left eye, from left to right in the picture.
_RIGHT, _LEFT = [36, 39], [42, 45]
# The network's points: the corners, and pairs of points on the upper and lower lid.
_OUTER, _INNER = 0, 8
_UPPER, _LOWER = [11, 13], [3, 5]


def eye_openness(frames: Iterable[np.ndarray], landmarks: np.ndarray) -> np.ndarray:
    """The eye aspect ratio (F,) float64 in frames (H, W, 3) uint8 RGB with a face at landmarks (F, 68, 2) px.

    EAR = (height of the lids' opening) / (width between the corners), the mean of two heights and of both eyes
    (Soukupova and Cech 2016): about 0.35 open, 0.1 shut. NaN if there is no face or an eye is less than 2 px wide.
    """
    return np.array([openness_of_frame(*pair) for pair in zip(frames, landmarks, strict=True)], np.float64)


def without_gaps(openness: np.ndarray) -> np.ndarray:
    """(F,) float32: NaN, where the eyes are not seen or too small to measure, becomes the median of the clip."""
    seen = openness[np.isfinite(openness)]
    return np.where(np.isfinite(openness), openness, np.median(seen) if len(seen) else 1.0).astype(np.float32)


def openness_of_frame(frame: np.ndarray, points: np.ndarray) -> float:
    """As `eye_openness`, of one frame (H, W, 3) with a face at points (68, 2) px."""
    widths = np.abs(points[[_RIGHT[1], _LEFT[1]]] - points[[_RIGHT[0], _LEFT[0]]]).max(axis=-1)  # (2,)
    if not (widths >= 2).all():  # also if they are NaN
        return float("nan")
    right, left = (_crop(frame, *points[corners]) for corners in (_RIGHT, _LEFT))
    # The network is trained on right eyes, so the left one is mirrored.
    return (_aspect_ratio(_lids(right)) + _aspect_ratio(_lids(left[:, ::-1]))) / 2


def _crop(frame: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The crop (64, 64, 3) around the eye with these two corners (2,) px, as MediaPipe cuts it."""
    x, y = ((begin + end) / 2).tolist()
    across, down = (end - begin).tolist()
    view = View(x, y, _SCALE * max(abs(across), abs(down)), math.atan2(down, across))
    return warp(frame, view.matrix(_PX), _PX)


def _lids(crop: np.ndarray) -> np.ndarray:
    """The outline (16, 2) px of the lids in the crop (64, 64, 3) uint8 of a right eye."""
    outputs = _network()(crop.astype(np.float32) / 255)
    return outputs["output_eyes_contours_and_brows"].reshape(71, 3)[:16, :2]


def _aspect_ratio(lids: np.ndarray) -> float:
    heights = np.linalg.norm(lids[_UPPER] - lids[_LOWER], axis=-1)
    width = np.linalg.norm(lids[_INNER] - lids[_OUTER])
    return float(heights.mean() / width)


@cache
def _network() -> FaceNet:
    return FaceNet("iris_landmark.tflite")
