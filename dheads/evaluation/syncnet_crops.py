"""Crops of a face for SyncNet, framed as in the code released with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import cv2
import numpy as np

from dheads.errors import DheadsError
from dheads.evaluation.footage import has_face
from dheads.faces.alignment import fill_gaps

SIZE = 224  # px, side of a crop
_FOREHEAD = 0.32  # of the landmarks' height
_CONTEXT = 0.4  # of half the box's larger side
_SMOOTH_FRAMES = 13
_GRAY = 110


def face_crops(frames: Iterable[np.ndarray], landmarks: np.ndarray) -> Iterator[np.ndarray]:
    """Crops (224, 224, 3) uint8 of F frames (H, W, 3) uint8 at 25 fps.

    landmarks: (F, 68, 2) px; rows of NaN (no face) are interpolated. With s half the larger side of the face's box,
    smoothed by a running median over 13 frames, the crop reaches from 1.4 s left to 1.4 s right of the box's centre and
    from s above to 1.8 s below it. Outside the frame it is gray.
    Raises DheadsError if no frame has a face.
    """
    if not has_face(landmarks).any():
        raise DheadsError("no frame shows a face, so SyncNet has nothing to look at; give a video with a face")
    boxes = _smoothed(_face_boxes(fill_gaps(landmarks.astype(np.float64), len(landmarks))))
    return (_crop(frame, *box) for frame, box in zip(frames, boxes, strict=True))


def _face_boxes(landmarks: np.ndarray) -> np.ndarray:
    """Centre and half the larger side, (F, 3) x y s px, of the box that the released code's detector would find.

    Landmarks (F, 68, 2) end at the brows, a detector's box at the hair. YuNet, trained on the same boxes (WIDER FACE),
    places its upper edge 0.32 of the landmarks' height above them (0.24 to 0.41 in 150 pictures), and the
    other edges where the landmarks end.
    """
    low, high = landmarks.min(axis=1), landmarks.max(axis=1)  # (F, 2)
    low[:, 1] -= _FOREHEAD * (high - low)[:, 1]
    return np.column_stack([(low + high) / 2, (high - low).max(axis=1) / 2])


def _smoothed(boxes: np.ndarray) -> np.ndarray:
    """The running median of boxes (F, 3) over 13 frames, fewer at the ends."""
    # The released code pads with zeros, which would pull the crops of short clips into a corner.
    margin = _SMOOTH_FRAMES // 2
    padded = np.pad(boxes, ((margin, margin), (0, 0)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, _SMOOTH_FRAMES, axis=0)  # (F, 3, 13)
    median: np.ndarray = np.nanmedian(windows, axis=-1)
    return median


def _crop(frame: np.ndarray, x: float, y: float, s: float) -> np.ndarray:
    # Bilinear and without antialiasing, like the pictures that the network was trained on.
    scale = max((2 + 2 * _CONTEXT) * s, 1) / SIZE  # px of the frame per px of the crop
    left, top = x - (1 + _CONTEXT) * s, y - s
    matrix = np.array([(scale, 0, left + (scale - 1) / 2), (0, scale, top + (scale - 1) / 2)])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(frame, matrix, (SIZE, SIZE), flags=flags, borderValue=(_GRAY, _GRAY, _GRAY))
