"""Generated crops pasted back into the photo, for networks that draw every pixel of a crop themselves.

Where the photo itself is moved, composition.py shows it whole.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from dheads.config import AlignmentConfig
from dheads.faces.alignment import apply_transform, framed, invert_transform, mean_face, transform_of_part, unwarp

LARGEST_SIDE_PX = 3840
# H.264 level 5.2, the highest that most players decode, has 36864 macroblocks of 16 x 16 px; partial blocks count.
FRAME_LIMIT_PX = 9_300_000
# Level 6.2, the highest that there is, has 139264.
LAST_LIMIT_PX = 35_000_000
_MARGIN_PX = 4  # of the crop, outside the mask: a cubic kernel reaches 2 px beyond the pixels that it resamples
_FEATHER = 1 / 12  # least width of the mask's edge, in sides of the crop
_REACH_PX = 1.5  # of the crop: standard deviation of the blur of changes
# In levels of 255: a smaller change than the first is blur of the generator and keeps the photo's fine detail; a larger
# one than the second is motion, under which the old detail would be visible.
_STILL, _MOVED = 6.0, 24.0


class Paster:
    """Puts crops back into the photo they were taken from.

        out = photo + up(mask (crop - rest)) - up(mask moved) fine

    rest is the photo's own crop, up() maps a crop back into the photo, and fine = photo - up(rest) is the detail that
    the crop cannot hold. Without motion this is the photo itself, so there is no seam; with strong motion (moved = 1)
    it is the enlarged crop, so that closed lips do not show under an open mouth. The mask is 1 on the mean face and
    falls smoothly to 0 at the crop's border.
    """

    # Clips of real people pasted over their own first frame: this keeps 12 % of the old mouth's detail (30.0 dB at the
    # mouth). The change alone keeps 99 % (26.9 dB), a blend of photo and crop by the size of the change 15 % (29.3 dB),
    # and the crop alone none (30.2 dB), but that softens the whole face.

    def __init__(
        self,
        photo: np.ndarray,
        matrix: np.ndarray,
        size: int,
        alignment: AlignmentConfig,
        largest_side: int | None = None,
    ) -> None:
        """photo: (H, W, 3) uint8. matrix: (2, 3) from it to crops of `size` px, by `alignment.align_transforms`.

        A photo with a side of more than `largest_side` px is reduced; None: to what most players decode. An odd last
        row or column is cut off, because H.264 needs even sizes.
        """
        self._rest = framed(photo, matrix, size)  # (S, S, 3), S = size
        self._mask = face_mask(alignment, size)  # (S, S)
        self._photo, matrix = reduced(photo, matrix, largest_side)
        self._region, self._matrix = covered_part(self._photo.shape, matrix, size)
        part = self._photo[self._region]
        self._fine = part - unwarp(self._rest.astype(np.float32), self._matrix, part.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the frames, px, both even."""
        height, width = self._photo.shape[:2]
        return height, width

    def __call__(self, crop: np.ndarray) -> np.ndarray:
        """The frame of `shape` (H', W', 3) uint8: the photo with the face of a crop (S, S, 3) uint8."""
        change = crop - np.clip(self._rest + _colour_cast(crop, self._rest), 0, 255)
        layers = self._mask[..., None] * np.dstack([change, _moved(change)])
        part = self._photo[self._region]
        layers = unwarp(layers.astype(np.float32), self._matrix, part.shape)  # (h, w, 4)
        # out = photo + up(mask change) - up(mask moved) fine
        pasted = layers[..., :3] - layers[..., 3:] * self._fine
        pasted += part
        frame = self._photo.copy()
        frame[self._region] = np.clip(np.rint(pasted, out=pasted), 0, 255, out=pasted)
        return frame


def face_mask(alignment: AlignmentConfig, size: int) -> np.ndarray:
    """The mask (S, S) float32 in [0, 1]: 1 on the mean face, falling from there to 0 at the crop's border.

    If the face reaches the border, as the chin can, the mask's edge lies on the face.
    """
    face = cv2.convexHull(np.rint(mean_face(alignment, size)).astype(np.int32))
    outside = cv2.fillConvexPoly(np.ones((size, size), np.uint8), face, 0)
    to_face = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    from_edge = np.minimum(np.arange(size), np.arange(size)[::-1]) - _MARGIN_PX
    to_border = np.maximum(np.minimum(from_edge, from_edge[:, None]), 0)
    return smoothstep(to_border / np.maximum(to_border + to_face, _FEATHER * size)).astype(np.float32)


def smoothstep(t: np.ndarray) -> np.ndarray:
    """3 t^2 - 2 t^3, with t clipped to [0, 1]."""
    t = np.clip(t, 0, 1)
    smooth: np.ndarray = t * t * (3 - 2 * t)
    return smooth


def _colour_cast(crop: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """The colour cast (3,) of a crop against `rest`: the median difference, since less than half of a face moves."""
    unclipped = ((crop > 0) & (crop < 255)).all(axis=-1)
    if not unclipped.any():
        return np.zeros(3, np.float32)
    cast: np.ndarray = np.median(crop[unclipped].astype(np.float32) - rest[unclipped], axis=0)
    return cast


def _moved(change: np.ndarray) -> np.ndarray:
    """The share of motion (S, S) in [0, 1] in a change (S, S, 3)."""
    amount = cv2.GaussianBlur(np.abs(change).max(axis=-1), (0, 0), _REACH_PX)
    return smoothstep((amount - _STILL) / (_MOVED - _STILL))


def reduced(photo: np.ndarray, matrix: np.ndarray, largest_side: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The photo reduced to at most that side, and the transform from it to the crop; None: to what players decode."""
    height, width = photo.shape[:2]
    side, pixels = (LARGEST_SIDE_PX, FRAME_LIMIT_PX) if largest_side is None else (largest_side, LAST_LIMIT_PX)
    scale = min(1, side / max(height, width), math.sqrt(pixels / (height * width)))
    if scale < 1:
        size = np.maximum(np.rint(np.array([width, height]) * scale), 2).astype(int)
        photo = cv2.resize(photo, size.tolist(), interpolation=cv2.INTER_AREA)
        matrix = transform_of_part(matrix, np.zeros(2), [width, height] / size)
    height, width = photo.shape[:2]
    return np.ascontiguousarray(photo[: height - height % 2, : width - width % 2]), matrix


def covered_part(shape: tuple[int, ...], matrix: np.ndarray, size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """The part of a picture of shape (H, W, ...) that the crop covers, and the transform from it to the crop."""
    corners = np.array([(0, 0), (size, 0), (0, size), (size, size)], float) - 0.5
    corners = apply_transform(invert_transform(matrix), corners)
    height, width = shape[:2]
    x0, y0 = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, (width - 1, height - 1)).tolist()
    x1, y1 = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 1, (x0 + 1, y0 + 1), (width, height)).tolist()
    return (slice(y0, y1), slice(x0, x1)), transform_of_part(matrix, np.array([x0, y0]))
