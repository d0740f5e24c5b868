"""How far open the eyes are, by MediaPipe's iris network: it sees each eye from near, as the face mesh does not.

The network (Ablavatski et al. 2020, arXiv 2006.11341) gives 71 points of the eye's outline and surroundings, of which
the lids' are the first 16, in a crop of 64 px.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import cv2
import numpy as np

from dheads.faces.alignment import warp
from dheads.faces.detection import View
from dheads.faces.mesh import load_net

_PX = 64
_SCALE = 2.3  # the crop's side, in widths of the eye
_RIGHT, _LEFT = [36, 39], [42, 45]  # landmarks: the corners of the person's own right and left eye, from left to right
# The network's points: the corners, and those of the lids that lie above each other.
_OUTER, _INNER = 0, 8
_UPPER, _LOWER = [11, 13], [3, 5]


def eye_openness(frames: Iterable[np.ndarray], landmarks: np.ndarray) -> np.ndarray:
    """The eye aspect ratio (F,) in (H, W, 3) uint8 RGB frames with a face at landmarks (F, 68, 2) px.

    EAR = (height of the lids' opening) / (width between the corners), mean of two heights and of both eyes (Soukupova
    and Cech 2016): about 0.35 open, 0.1 shut. NaN where there is no face, or an eye is under 2 px wide. One frame is
    taken at a time.
    """
    return np.array([_openness(*pair) for pair in zip(frames, landmarks, strict=True)], np.float64)


def _openness(frame: np.ndarray, points: np.ndarray) -> float:
    widths = np.abs(points[[_RIGHT[1], _LEFT[1]]] - points[[_RIGHT[0], _LEFT[0]]]).max(axis=-1)  # (2,)
    if not (widths >= 2).all():  # so it is for NaN
        return float("nan")
    right, left = (_crop(frame, *points[corners]) for corners in (_RIGHT, _LEFT))
    # The network knows a right eye; a mirrored left one is as open.
    return (_aspect_ratio(_lids(right)) + _aspect_ratio(_lids(left[:, ::-1]))) / 2


def _crop(frame: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The eye (64, 64, 3) between two corners (2,) px, as MediaPipe frames it."""
    x, y = ((begin + end) / 2).tolist()
    across, down = (end - begin).tolist()
    view = View(x, y, _SCALE * max(abs(across), abs(down)), math.atan2(down, across))
    return warp(frame, view.matrix(_PX), _PX)


def _lids(crop: np.ndarray) -> np.ndarray:
    """The outline (16, 2) px of a right eye in its crop (64, 64, 3) uint8."""
    net = _network()
    net.setInput(cv2.dnn.blobFromImage(crop.astype(np.float32) / 255))
    return net.forward("output_eyes_contours_and_brows").reshape(71, 3)[:16, :2]


def _aspect_ratio(lids: np.ndarray) -> float:
    heights = np.linalg.norm(lids[_UPPER] - lids[_LOWER], axis=-1)
    width = np.linalg.norm(lids[_INNER] - lids[_OUTER])
    return float(heights.mean() / width)


@cache
def _network() -> Any:
    return load_net("iris_landmark.tflite")
