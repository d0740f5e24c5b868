"""Where the head is in a crop, and which way it faces: six numbers a frame.

scale, roll, x, y  the similarity S from the mean face to the face: the logarithm of its factor, its angle in radians
                   (clockwise on the screen), and its shift
yaw, pitch         the tip of the nose relative to the middle between the eyes, in the head's own frame (after S^-1), in
                   eye distances, less what it is in the mean face

Coordinates run from -1 to 1 across the crop, about its centre. A head just where the mean face is has zeros.
"""

from __future__ import annotations

import numpy as np

from dheads.config import AlignmentConfig
from dheads.faces.alignment import EYES, STABLE, fit_similarity, mean_face, smoothed

POSE = ("scale", "roll", "x", "y", "yaw", "pitch")
_SMOOTH_FRAMES = 1.5  # landmarks tremble by more than heads do from frame to frame
_NOSE_TIP = 30


def head_pose(landmarks: np.ndarray, alignment: AlignmentConfig, size: int) -> np.ndarray:
    """The pose (F, 6) float32 of a face with landmarks (F, 68, 2) px in a crop of `size` px."""
    face = _centred(mean_face(alignment, size).astype(np.float64), size)
    points = _centred(smoothed(landmarks.astype(np.float64), _SMOOTH_FRAMES), size)
    to_face = fit_similarity(points[:, STABLE], face[STABLE])  # (F, 2, 3), S^-1
    own = points @ to_face[:, :, :2].transpose(0, 2, 1) + to_face[:, None, :, 2]  # (F, 68, 2), in the head's frame
    turn = (_nose(own) - _nose(face)) / (2 * alignment.eye_distance)
    # S^-1 z = c z + d, so S z = z / c - d / c, with points as complex numbers
    c, d = to_face[:, :, 0] @ (1, 1j), to_face[:, :, 2] @ (1, 1j)
    shift = -d / c
    pose = [-np.log(np.abs(c)), -np.angle(c), shift.real, shift.imag, turn[:, 0], turn[:, 1]]
    return np.stack(pose, axis=1).astype(np.float32)


def _centred(points: np.ndarray, size: int) -> np.ndarray:
    """Points in px -> from -1 to 1."""
    return (2 * points + 1) / size - 1


def _nose(points: np.ndarray) -> np.ndarray:
    """From the middle between the eyes to the tip of the nose, (..., 2)."""
    eyes: np.ndarray = sum(points[..., eye, :].mean(axis=-2) for eye in EYES) / 2
    difference: np.ndarray = points[..., _NOSE_TIP, :] - eyes
    return difference
