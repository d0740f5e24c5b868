"""Geometry of faces with 68 landmarks (iBUG order): alignment to the mean face, warps, measures.

Points are in pixels (x, y) with (0, 0) at the centre of the top left pixel, as in cv2.warpAffine. A transform is a
(2, 3) matrix, from the picture to the crop unless stated otherwise.
"""

from __future__ import annotations

import io
import itertools
import math
from functools import cache
from importlib import resources

import cv2
import numpy as np

from dheads.config import AlignmentConfig

EYES = np.arange(36, 42), np.arange(42, 48)
MOUTH = np.arange(48, 68)
# Landmarks that speech, blinks and raised eyebrows do not move: the upper jaw line, the nose, the corners of the eyes.
STABLE = np.array([0, 1, 2, 3, 13, 14, 15, 16, *range(27, 36), 36, 39, 42, 45])


# ---- Alignment ----


@cache
def _unit_mean_face() -> np.ndarray:
    """The mean face (68, 2), centred between the eyes, in eye distances."""
    asset = resources.files("dheads").joinpath("assets", "mean_face.npy")
    face: np.ndarray = np.load(io.BytesIO(asset.read_bytes()))
    return face


def mean_face(alignment: AlignmentConfig, size: int) -> np.ndarray:
    """The mean face (68, 2) float32 px in a crop of `size` px: eyes level and centred, at the height of `alignment`."""
    # 0.5: `alignment` counts from the crop's edge, points from the centre of its first pixel.
    eyes = np.array([0.5, alignment.eye_y]) * size - 0.5
    return (_unit_mean_face() * alignment.eye_distance * size + eyes).astype(np.float32)


def align_transforms(landmarks: np.ndarray, alignment: AlignmentConfig, size: int) -> np.ndarray:
    """Similarity transforms (F, 2, 3) float64 from landmarks (F, 68, 2) px, smoothed over time, to the mean face.

    They fit the `STABLE` landmarks. A NaN row gives a NaN transform.
    """
    steady = smoothed(landmarks.astype(np.float64), alignment.smooth_frames)
    return fit_similarity(steady[:, STABLE], mean_face(alignment, size).astype(np.float64)[STABLE])


def fit_similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The similarity transforms (..., 2, 3) from points (..., P, 2) to points (P, 2) of least squares, not mirrored."""
    # With points as complex numbers: w = a z + b, a = sum conj(z - mean z) (w - mean w) / sum |z - mean z|^2
    z, w = source @ (1, 1j), target @ (1, 1j)  # (..., P), (P,)
    centred = z - z.mean(axis=-1, keepdims=True)
    a = (centred.conj() * (w - w.mean())).sum(axis=-1) * (1 / (np.abs(centred) ** 2).sum(axis=-1))
    b = w.mean() - a * z.mean(axis=-1)
    rows = [a.real, -a.imag, b.real], [a.imag, a.real, b.imag]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def smoothed(landmarks: np.ndarray, sigma: float) -> np.ndarray:
    """Landmarks (F, 68, 2) filtered by a Gaussian over time, sigma in frames, renormalised at gaps and at the ends.

    NaN rows stay NaN and have no weight.
    """
    if sigma <= 0 or len(landmarks) < 2:
        return landmarks
    seen = np.isfinite(landmarks).all(axis=(1, 2))[:, None]
    rows = np.column_stack([np.where(seen, landmarks.reshape(len(landmarks), -1), 0), seen])  # last: the weights
    window = (1, 2 * math.ceil(4 * sigma) + 1)
    sums = cv2.GaussianBlur(rows, window, sigmaX=sigma, sigmaY=sigma, borderType=cv2.BORDER_CONSTANT)
    filtered = np.full_like(sums[:, :-1], np.nan)
    return np.divide(sums[:, :-1], sums[:, -1:], out=filtered, where=seen).reshape(landmarks.shape)


def fill_gaps(landmarks: np.ndarray, max_gap: int) -> np.ndarray:
    """Landmarks (F, 68, 2) with gaps of up to `max_gap` NaN rows filled: linearly, at the ends by the nearest row."""
    seen = np.flatnonzero(np.isfinite(landmarks).all(axis=(1, 2)))
    filled = landmarks.copy()
    if len(seen) == 0:
        return filled
    edges = [-1, *seen, len(landmarks)]
    for before, after in itertools.pairwise(edges):
        if not 0 < after - before - 1 <= max_gap:
            continue
        first = landmarks[max(before, seen[0])]
        last = landmarks[min(after, seen[-1])]
        weight = (np.arange(before + 1, after) - before)[:, None, None] / (after - before)
        filled[before + 1 : after] = first + weight * (last - first)
    return filled


# ---- Transforms ----


def apply_transform(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 2) px mapped by a transform (2, 3)."""
    mapped: np.ndarray = points @ matrix[:, :2].T + matrix[:, 2]
    return mapped


def invert_transform(matrix: np.ndarray) -> np.ndarray:
    """The inverse (2, 3) of a transform (2, 3)."""
    inverse = np.linalg.inv(matrix[:, :2])
    return np.column_stack([inverse, -inverse @ matrix[:, 2]])


def scale_points(points: np.ndarray, factor: float | np.ndarray) -> np.ndarray:
    """Points (..., 2) px of a picture, in the same picture made `factor` times as large.

    factor: one number, or one for each axis.
    """
    # A pixel's centre is half a pixel from its edge, where the picture begins: x' + 1/2 = factor (x + 1/2)
    scaled: np.ndarray = (points + 0.5) * factor - 0.5
    return scaled


def transform_of_part(matrix: np.ndarray, corner: np.ndarray, factor: float | np.ndarray = 1.0) -> np.ndarray:
    """The transform (2, 3) `matrix` of a picture, for a part of it that is reduced by `factor`.

    corner: the part's first pixel (x, y) in the picture. factor: one number, or one for each axis.
    """
    # x = factor u + corner + (factor - 1) / 2, from the part's u to the picture's x
    origin = corner + scale_points(np.zeros(2), factor)
    return np.column_stack([matrix[:, :2] * factor, apply_transform(matrix, origin)])


def warp(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """The crop (size, size, 3) uint8 of a picture (H, W, 3); beyond the picture its edge pixels are repeated."""
    return _resample(image, matrix, (size, size), cv2.BORDER_REPLICATE)


def scale_of(matrix: np.ndarray) -> float:
    """How many px of the crop a px of the image becomes by a transform (2, 3)."""
    return math.sqrt(abs(np.linalg.det(matrix[:, :2])))


def scaled_transform(matrix: np.ndarray, factor: float) -> np.ndarray:
    """The transform (2, 3) to crops of `factor` times as many pixels a side that show the same."""
    scaled: np.ndarray = factor * matrix
    scaled[:, 2] += (factor - 1) / 2  # pixels are counted from the centre of the first
    return scaled


def framed(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """As `warp`, but beyond the picture the crop is blurred, the more the farther from the edge, to show no streaks."""
    cropped = warp(image, matrix, size)
    beyond = beyond_edge(image.shape, matrix, size)[..., None]
    if not beyond.any():
        return cropped
    blurred: np.ndarray = cropped.astype(np.float32)
    small = blurred
    for level in range(1, size.bit_length() - 1):
        half = (small.shape[0] + 1) // 2
        small = cv2.resize(small, (half, half), interpolation=cv2.INTER_AREA)
        wide = cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)
        # An average over 2^level px is reached 0.75 2^level px beyond the edge; halfway to it lies the previous level.
        blurred = blurred + np.clip(beyond / (0.375 * 2**level) - 1, 0, 1) * (wide - blurred)
    shown: np.ndarray = np.clip(np.rint(blurred), 0, 255).astype(np.uint8)
    return shown


def beyond_edge(shape: tuple[int, ...], matrix: np.ndarray, size: int) -> np.ndarray:
    """The distance of each crop pixel beyond the edge of a picture of shape (H, W, ...): (size, size) float32, crop px.

    It is 0 within the picture.
    """
    inverse, last = invert_transform(matrix), np.array(shape[1::-1]) - 1

    def beyond(pixels: np.ndarray) -> np.ndarray:
        points = apply_transform(inverse, np.stack(np.meshgrid(pixels, pixels), axis=-1))  # (x, y) in the picture
        outside: np.ndarray = np.maximum(np.maximum(-points, points - last) - 0.5, 0)
        return outside

    # A crop whose corners lie within the picture does so as a whole, and most do.
    if not beyond(np.array([0, size - 1])).any():
        return np.zeros((size, size), np.float32)
    distance = np.linalg.norm(beyond(np.arange(size)), axis=-1)
    return (distance * scale_of(matrix)).astype(np.float32)


def unwarp(crop: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A crop mapped back into a picture of shape (H, W, ...), black outside the crop."""
    return _resample(crop, invert_transform(matrix), (shape[1], shape[0]), cv2.BORDER_CONSTANT)


def _resample(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], border: int) -> np.ndarray:
    """cv2.warpAffine to `size` (width, height) that averages when it shrinks: skipped pixels would flicker."""
    scale = scale_of(matrix)
    factor = max(1, int(1 / scale))
    if scale < 1:
        image, matrix = _reduce(image, matrix, size, factor)
        scale *= factor
    if scale < 1:
        # The blur that turns a pixel of the picture into one of the smaller crop.
        image = cv2.GaussianBlur(
            image, (0, 0), 0.5 * math.sqrt(1 / scale**2 - 1) + 1e-3, borderType=cv2.BORDER_REPLICATE
        )
    return cv2.warpAffine(image, matrix, size, flags=cv2.INTER_CUBIC, borderMode=border)


def _reduce(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], factor: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of the picture that a crop of `size` (width, height) shows, reduced by `factor`, and its transform."""
    height, width = image.shape[:2]
    corners = apply_transform(invert_transform(matrix), np.array([(0, 0), (size[0], 0), (0, size[1]), size], float))
    margin = max(4 * factor, 8)  # the reach of the blur and of the cubic kernel
    x0, y0 = np.clip(np.floor(corners.min(axis=0)).astype(int) - margin, 0, (width - 1, height - 1))
    x1, y1 = np.clip(np.ceil(corners.max(axis=0)).astype(int) + margin, (x0 + 1, y0 + 1), (width, height))
    part = image[y0:y1, x0:x1]
    if factor > 1:
        bottom, right = -part.shape[0] % factor, -part.shape[1] % factor
        part = cv2.copyMakeBorder(part, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
        part = cv2.resize(part, (part.shape[1] // factor, part.shape[0] // factor), interpolation=cv2.INTER_AREA)
    return part, transform_of_part(matrix, np.array([x0, y0]), factor)


# ---- Measures ----


def mouth_box(landmarks: np.ndarray, size: int, margin: float = 5 / 128) -> np.ndarray:
    """The box of the mouth (..., 4) int, x0 y0 x1 y1 in half-open px, of landmarks (..., 68, 2) in a crop of `size` px.

    It is enlarged by `margin` times the size on each side (the paper: 5 px at 128), inside the crop, never empty.
    """
    return region_box(landmarks, MOUTH, size, margin)


def region_box(landmarks: np.ndarray, chosen: range | np.ndarray, size: int, margin: float = 5 / 128) -> np.ndarray:
    """As `mouth_box`, around those of the landmarks that are chosen by their numbers."""
    points = landmarks[..., np.asarray(chosen), :]
    low = np.floor(points.min(axis=-2) - margin * size)
    high = np.ceil(points.max(axis=-2) + margin * size) + 1
    low = np.clip(low, 0, size - 1)
    return np.concatenate([low, np.clip(high, low + 1, size)], axis=-1).astype(int)


def _eye_axis(landmarks: np.ndarray) -> np.ndarray:
    """From the centre of the eye on the left of the picture to that of the other, px (..., 2)."""
    axis: np.ndarray = landmarks[..., EYES[1], :].mean(axis=-2) - landmarks[..., EYES[0], :].mean(axis=-2)
    return axis


def eye_distance(landmarks: np.ndarray) -> np.ndarray:
    """The distance (...) between the eyes' centres, px, of landmarks (..., 68, 2)."""
    distance: np.ndarray = np.linalg.norm(_eye_axis(landmarks), axis=-1)
    return distance


def _height(landmarks: np.ndarray, lower: list[int], upper: list[int]) -> np.ndarray:
    """The mean height (...) of lower points below upper ones, perpendicular to the eye axis, in eye distances."""
    x, y = np.moveaxis(_eye_axis(landmarks), -1, 0)
    down = np.stack([-y, x], axis=-1) / (x**2 + y**2)[..., None]
    between = (landmarks[..., lower, :] - landmarks[..., upper, :]).mean(axis=-2)
    height: np.ndarray = (between * down).sum(axis=-1)
    return height


def mouth_opening(landmarks: np.ndarray) -> np.ndarray:
    """The height (...) between the inner lips, in eye distances: 0 when closed, negative if their landmarks cross."""
    return _height(landmarks, [67, 66, 65], [61, 62, 63])


def mouth_width(landmarks: np.ndarray) -> np.ndarray:
    """The distance (...) between the mouth's corners, in eye distances."""
    corners = np.linalg.norm(landmarks[..., 48, :] - landmarks[..., 54, :], axis=-1)
    width: np.ndarray = corners / eye_distance(landmarks)
    return width


def lip_thickness(landmarks: np.ndarray) -> np.ndarray:
    """The thickness (...) of both lips together, in eye distances: the outer height less the opening."""
    thickness: np.ndarray = _height(landmarks, [58, 57, 56], [50, 51, 52]) - mouth_opening(landmarks)
    return thickness
