"""Frames of a video composed of a photo's own pixels, moved, and of what a network drew.

    out = drawn + g_1 photo + g_2 warp(photo),  g_0 + g_1 + g_2 = 1

A frame comes as layers (h, w, 7) float32 over the crop: what was drawn, in levels of 255 and already multiplied by its
share g_0 (3); the shares g_0 and g_1 of what is drawn and of the photo in place (2); and the offset from each pixel to
where the photo moved comes from, in half sides of the crop (2). Every frame is sampled from the photo, so nothing
softens over time, and at any size what comes from the photo is as sharp as the photo. What is drawn beyond the outline
of the photo's face is left out: a network draws mouths well, and the background beside a turned jaw badly.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from dheads.config import AlignmentConfig
from dheads.faces.alignment import framed, mean_face, scaled_transform, transform_of_part, unwarp
from dheads.faces.paste import covered_part, reduced, smoothstep

_MARGIN = 0.2  # of the crop's side: what a head that moves uncovers beyond the crop
_REACH = 1.6  # times the crop's side: how far from the face its motion ends, where it is pasted into the photo
_SEAM = 0.1  # of the crop's side: width of the border over which what is drawn ends
_FIELD_PX = 160  # of a side of the picture in which this is computed
_CHIN = 0.2  # eye distances that a chin moves down, at most
_BORDER = 0.1  # eye distances within the outline of a face over which what is drawn ends
_LOWER_JAW = slice(3, 14)  # landmarks


Enlarge = Callable[[np.ndarray, int], np.ndarray]  # values over the crop (h, w, C), interpolation -> over the frame


class Composition:
    """Composes the frames of one video."""

    def __init__(self, source: np.ndarray, part: tuple[slice, slice], to_px: np.ndarray, enlarge: Enlarge) -> None:
        """source (H, W, 3) uint8: the photo; part: the rows and columns of it that frames show; to_px (2, 2): from half
        sides of the crop to px of the photo."""
        self._source, self._photo = source, source[part]
        rows, columns = (np.arange(axis.start, axis.stop, dtype=np.float32) for axis in part)
        self._columns, self._rows = np.meshgrid(columns, rows)  # where the photo in place comes from
        self._to_px, self._enlarge = to_px.astype(np.float32), enlarge

    def __call__(self, layers: np.ndarray, fading: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
        """The frame (H', W', 3) uint8 of layers (h, w, 7).

        fading: factors (H', W') of the offset, and of g_0 and g_1; None: 1 everywhere.
        """
        offset = cv2.transform(layers[..., 5:], self._to_px)
        own, in_place, right, down = cv2.split(self._enlarge(np.dstack([layers[..., 3:5], offset]), cv2.INTER_LINEAR))
        frame = self._enlarge(layers[..., :3], cv2.INTER_CUBIC)
        if fading is not None:
            steady, inside = fading
            frame, own, in_place = frame * inside[..., None], own * inside, in_place * inside
            right, down = right * steady, down * steady
        right, down = right + self._columns, down + self._rows
        moved = cv2.remap(self._source, right, down, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        frame = frame + in_place[..., None] * self._photo
        frame += (1 - own - in_place)[..., None] * moved
        return np.clip(np.rint(frame, out=frame), 0, 255, out=frame).astype(np.uint8)


class Outline:
    """The outline of a photo's face, beyond which nothing that is drawn is shown."""

    def __init__(self, landmarks: np.ndarray, alignment: AlignmentConfig, size: int) -> None:
        """landmarks (68, 2) px of the crop at the size of layers, `size` px."""
        eyes = alignment.eye_distance * size
        points = np.concatenate([landmarks, landmarks[_LOWER_JAW] + (0, _CHIN * eyes)])
        hull = cv2.convexHull(np.rint(points).astype(np.int32))
        inside = cv2.fillConvexPoly(np.zeros((size, size), np.uint8), hull, 1)
        depth = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        self._inside = np.clip(depth / (_BORDER * eyes), 0, 1)  # (size, size)
        self._columns, self._rows = np.meshgrid(*2 * [np.arange(size, dtype=np.float32)])

    def __call__(self, layers: np.ndarray) -> np.ndarray:
        """Layers (h, w, 7) with what is drawn ending at the outline, moved as the photo is."""
        offset = layers[..., 5:] * (len(layers) / 2)
        right, down = offset[..., 0] + self._columns, offset[..., 1] + self._rows
        inside = cv2.remap(self._inside, right, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return np.concatenate([layers[..., :4] * inside[..., None], layers[..., 4:]], axis=-1)


def crop_composition(
    picture: np.ndarray, matrix: np.ndarray, size: int, side: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Frames of `side` px that show the crop. matrix (2, 3): from the picture to crops of `size` px."""
    margin = round(_MARGIN * side)
    wide = scaled_transform(matrix, side / size)
    wide[:, 2] += margin
    source = framed(picture, wide, side + 2 * margin)
    part = slice(margin, margin + side)

    def enlarge(values: np.ndarray, kernel: int) -> np.ndarray:
        return values if len(values) == side else cv2.resize(values, (side, side), interpolation=kernel)

    return Composition(source, (part, part), np.eye(2) * side / 2, enlarge)


class PastedComposition:
    """Composes frames that show the whole photo: the motion of the head ends around it, and nothing has an edge."""

    def __init__(
        self,
        picture: np.ndarray,
        matrix: np.ndarray,
        size: int,
        alignment: AlignmentConfig,
        largest_side: int | None = None,
    ) -> None:
        """matrix (2, 3): from the picture to crops of `size` px.

        A picture with a side of more than `largest_side` px is reduced; None: to what most players decode.
        """
        self._photo, matrix = reduced(picture, matrix, largest_side)
        to_field = scaled_transform(matrix, _FIELD_PX / (_REACH * size))
        to_field[:, 2] += _FIELD_PX * (_REACH - 1) / (2 * _REACH)
        self._part, to_field = covered_part(self._photo.shape, to_field, _FIELD_PX)
        corner = np.array([self._part[1].start, self._part[0].start])
        shape, matrix = self._photo[self._part].shape, transform_of_part(matrix, corner)

        def enlarge(values: np.ndarray, kernel: int) -> np.ndarray:
            to_layers, flags = scaled_transform(matrix, len(values) / size), kernel | cv2.WARP_INVERSE_MAP
            return cv2.warpAffine(values, to_layers, shape[1::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)

        to_px = np.linalg.inv(matrix[:, :2]) * (size / 2)
        self._composition = Composition(self._photo, self._part, to_px, enlarge)
        steady, inside = (np.clip(unwarp(field, to_field, shape), 0, 1) for field in _fields(alignment))
        self._fading = steady, inside

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the frames, px, both even."""
        height, width = self._photo.shape[:2]
        return height, width

    def __call__(self, layers: np.ndarray) -> np.ndarray:
        """The frame of `shape` (H', W', 3) uint8."""
        frame = self._photo.copy()
        frame[self._part] = self._composition(layers, self._fading)
        return frame


def _fields(alignment: AlignmentConfig) -> tuple[np.ndarray, np.ndarray]:
    """Around the crop, at _FIELD_PX: how far the photo moves with the head, and how much of what is drawn is shown.

    Both are 1 on the mean face; the first falls to 0 at the border, the second at the border of the crop.
    """
    size = round(_FIELD_PX / _REACH)  # of the crop
    corner = (_FIELD_PX - size) / 2
    face = cv2.convexHull(np.rint(mean_face(alignment, size) + corner).astype(np.int32))
    outside = cv2.fillConvexPoly(np.ones((_FIELD_PX, _FIELD_PX), np.uint8), face, 0)
    to_face = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    from_edge = np.minimum(np.arange(_FIELD_PX), np.arange(_FIELD_PX)[::-1])
    to_border = np.minimum(from_edge, from_edge[:, None])
    steady = smoothstep(to_border / np.maximum(to_border + to_face, 1))
    inside = smoothstep((to_border - corner) / (_SEAM * size))
    return steady.astype(np.float32), inside.astype(np.float32)
