"""Geometry of a face with 68 landmarks (iBUG order): the transform that lays it on the mean face, warps, measures.

Points are in pixels with (0, 0) at the centre of the top left pixel, as cv2.warpAffine takes them. A transform is a
(2, 3) matrix from the picture to the crop.
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
# What talking, blinking and raised eyebrows do not move: the upper jaw line, the nose, the corners of the eyes.
STABLE = np.array([0, 1, 2, 3, 13, 14, 15, 16, *range(27, 36), 36, 39, 42, 45])


# ---- Alignment ----


@cache
def _unit_mean_face() -> np.ndarray:
    asset = resources.files("dheads").joinpath("assets", "mean_face.npy")
    return np.load(io.BytesIO(asset.read_bytes()))


def mean_face(alignment: AlignmentConfig, size: int) -> np.ndarray:
    """The mean face (68, 2) float32 px in a crop of `size` px: the eyes level, centred, where `alignment` says."""
    # Lengths count from the crop's edge, points from the centre of its first pixel.
    eyes = np.array([0.5, alignment.eye_y]) * size - 0.5
    return (_unit_mean_face() * alignment.eye_distance * size + eyes).astype(np.float32)


def align_transforms(landmarks: np.ndarray, alignment: AlignmentConfig, size: int) -> np.ndarray:
    """Similarities (F, 2, 3) float64 that lay landmarks (F, 68, 2) px, smoothed over time, on the mean face.

    Least squares over the points that talking does not move. A NaN row gives a NaN transform.
    """
    source = _smooth(landmarks.astype(np.float64), alignment.smooth_frames)[:, STABLE] @ (1, 1j)  # (F, P)
    target = mean_face(alignment, size).astype(np.float64)[STABLE] @ (1, 1j)  # (P,)
    # w = a z + b; a = sum conj(z - mean z) (w - mean w) / sum |z - mean z|^2. A complex factor cannot mirror.
    z = source - source.mean(axis=1, keepdims=True)
    w = target - target.mean()
    a = (z.conj() * w).sum(axis=1) * (1 / (np.abs(z) ** 2).sum(axis=1))
    b = target.mean() - a * source.mean(axis=1)
    return np.stack([a.real, -a.imag, b.real, a.imag, a.real, b.imag], axis=-1).reshape(-1, 2, 3)


def _smooth(landmarks: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian over time, in frames. It passes over NaN rows, which stay NaN; at the ends it is renormalised."""
    if sigma <= 0 or len(landmarks) < 2:
        return landmarks
    seen = np.isfinite(landmarks).all(axis=(1, 2))[:, None]
    rows = np.column_stack([np.where(seen, landmarks.reshape(len(landmarks), -1), 0), seen])  # last: the weights
    window = (1, 2 * math.ceil(4 * sigma) + 1)
    sums = cv2.GaussianBlur(rows, window, sigmaX=sigma, sigmaY=sigma, borderType=cv2.BORDER_CONSTANT)
    smoothed = np.full_like(sums[:, :-1], np.nan)
    return np.divide(sums[:, :-1], sums[:, -1:], out=smoothed, where=seen).reshape(landmarks.shape)


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
    """Points (..., 2) px through a (2, 3) matrix."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def invert_transform(matrix: np.ndarray) -> np.ndarray:
    """The (2, 3) matrix of the way back."""
    inverse = np.linalg.inv(matrix[:, :2])
    return np.column_stack([inverse, -inverse @ matrix[:, 2]])


def warp(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """The crop (size, size, 3) uint8 of a picture, for networks: beyond the edge its last pixels are repeated."""
    return _resample(image, matrix, (size, size), cv2.BORDER_REPLICATE)


def framed(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """As `warp`, for a crop that is shown: what lies beyond the picture's edge is blurred, the more the farther off."""
    cropped = warp(image, matrix, size)
    beyond = beyond_edge(image.shape, matrix, size)[..., None]
    if not beyond.any():
        return cropped
    blurred = small = cropped.astype(np.float32)
    for level in range(1, size.bit_length() - 1):
        half = (small.shape[0] + 1) // 2
        small = cv2.resize(small, (half, half), interpolation=cv2.INTER_AREA)
        wide = cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)
        # Averages over 2^level px are reached 0.75 2^level px off, and half that way those of the level before.
        blurred = blurred + np.clip(beyond / (0.375 * 2**level) - 1, 0, 1) * (wide - blurred)
    return np.clip(np.rint(blurred), 0, 255).astype(np.uint8)


def beyond_edge(shape: tuple[int, ...], matrix: np.ndarray, size: int) -> np.ndarray:
    """(size, size) float32: how far each pixel of a crop lies beyond the edge of a picture (H, W, ...), px of the crop.

    0 within the picture.
    """
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1)
    points = apply_transform(invert_transform(matrix), grid)  # (size, size, 2), x and y in the picture
    last = np.array(shape[1::-1]) - 1
    off = np.linalg.norm(np.maximum(np.maximum(-points, points - last) - 0.5, 0), axis=-1)
    return (off * math.sqrt(abs(np.linalg.det(matrix[:, :2])))).astype(np.float32)


def unwarp(crop: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A crop back at its place in a picture of that shape (H, W, ...); black around it."""
    return _resample(crop, invert_transform(matrix), (shape[1], shape[0]), cv2.BORDER_CONSTANT)


def _resample(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], border: int) -> np.ndarray:
    """cv2.warpAffine to (width, height) that averages where it shrinks, as pixels skipped would flicker."""
    scale = math.sqrt(abs(np.linalg.det(matrix[:, :2])))
    factor = max(1, int(1 / scale))
    if scale < 1:
        image, matrix = _reduce(image, matrix, size, factor)
        scale *= factor
    if scale < 1:
        # The blur that a unit pixel lacks to be a pixel of the shrunken picture.
        image = cv2.GaussianBlur(
            image, (0, 0), 0.5 * math.sqrt(1 / scale**2 - 1) + 1e-3, borderType=cv2.BORDER_REPLICATE
        )
    return cv2.warpAffine(image, matrix, size, flags=cv2.INTER_CUBIC, borderMode=border)


def _reduce(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], factor: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of the picture that a crop of that size shows, reduced by a whole factor, and its transform."""
    height, width = image.shape[:2]
    corners = apply_transform(invert_transform(matrix), np.array([(0, 0), (size[0], 0), (0, size[1]), size], float))
    margin = max(4 * factor, 8)  # as far as the blur and the cubic kernel reach
    x0, y0 = np.clip(np.floor(corners.min(axis=0)).astype(int) - margin, 0, (width - 1, height - 1))
    x1, y1 = np.clip(np.ceil(corners.max(axis=0)).astype(int) + margin, (x0 + 1, y0 + 1), (width, height))
    part = image[y0:y1, x0:x1]
    if factor > 1:
        bottom, right = -part.shape[0] % factor, -part.shape[1] % factor
        part = cv2.copyMakeBorder(part, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
        part = cv2.resize(part, (part.shape[1] // factor, part.shape[0] // factor), interpolation=cv2.INTER_AREA)
    # x = factor u + x0 + (factor - 1) / 2, from the reduced part's u to the picture's x
    offset = np.array([x0, y0]) + (factor - 1) / 2
    return part, np.column_stack([matrix[:, :2] * factor, apply_transform(matrix, offset)])


# ---- Measures ----


def mouth_box(landmarks: np.ndarray, size: int, margin: float = 5 / 128) -> np.ndarray:
    """The mouth's box (..., 4) int, x0 y0 x1 y1 half-open px, of landmarks (..., 68, 2) in a crop of `size` px.

    Enlarged by `margin` times the size on each side (the paper: 5 px at 128), inside the crop, never empty.
    """
    return region_box(landmarks, MOUTH, size, margin)


def region_box(landmarks: np.ndarray, chosen: range | np.ndarray, size: int, margin: float = 5 / 128) -> np.ndarray:
    """As `mouth_box`, around those of the landmarks that are chosen by their numbers."""
    points = landmarks[..., np.asarray(chosen), :]
    low = np.floor(points.min(axis=-2) - margin * size)
    high = np.ceil(points.max(axis=-2) + margin * size) + 1
    low = np.clip(low, 0, size - 1)
    return np.concatenate([low, np.clip(high, low + 1, size)], axis=-1).astype(int)


def _distance(landmarks: np.ndarray, a: int, b: int) -> np.ndarray:
    return np.linalg.norm(landmarks[..., a, :] - landmarks[..., b, :], axis=-1)


def _eye_axis(landmarks: np.ndarray) -> np.ndarray:
    return landmarks[..., EYES[1], :].mean(axis=-2) - landmarks[..., EYES[0], :].mean(axis=-2)


def eye_distance(landmarks: np.ndarray) -> np.ndarray:
    """Between the eyes' centres, px, of landmarks (..., 68, 2)."""
    return np.linalg.norm(_eye_axis(landmarks), axis=-1)


def _height(landmarks: np.ndarray, lower: list[int], upper: list[int]) -> np.ndarray:
    """How far points lie below others, along the face's own down direction, in eye distances; the pairs' mean."""
    x, y = np.moveaxis(_eye_axis(landmarks), -1, 0)
    down = np.stack([-y, x], axis=-1) / (x**2 + y**2)[..., None]
    between = (landmarks[..., lower, :] - landmarks[..., upper, :]).mean(axis=-2)
    return (between * down).sum(axis=-1)


def mouth_opening(landmarks: np.ndarray) -> np.ndarray:
    """Between the inner lips, in eye distances, signed: zero when closed, below it when the lips' lines cross."""
    return _height(landmarks, [67, 66, 65], [61, 62, 63])


def mouth_width(landmarks: np.ndarray) -> np.ndarray:
    """Between the mouth's corners, in eye distances."""
    return _distance(landmarks, 48, 54) / eye_distance(landmarks)


def lip_thickness(landmarks: np.ndarray) -> np.ndarray:
    """Both lips together, in eye distances: the outer height less the opening."""
    return _height(landmarks, [58, 57, 56], [50, 51, 52]) - mouth_opening(landmarks)


def eye_openness(landmarks: np.ndarray) -> np.ndarray:
    """The eye aspect ratio (Soukupova and Cech 2016), mean of both eyes: about 0.3 open, 0.1 shut."""
    return sum(
        (_distance(landmarks, i + 1, i + 5) + _distance(landmarks, i + 2, i + 4)) / _distance(landmarks, i, i + 3) / 4
        for i in (36, 42)
    )
