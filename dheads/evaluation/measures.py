"""Measures of a talking-head video as pure functions: of signals (F,), crops (S, S, 3) and landmarks (F, 68, 2).

Rows of NaN are frames without a face and are ignored. A measure without a value is NaN.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
from skimage.metrics import structural_similarity

from dheads.config import FPS, AlignmentConfig
from dheads.faces.alignment import (
    MOUTH,
    STABLE,
    align_transforms,
    apply_transform,
    fit_similarity,
    mean_face,
    mouth_box,
)
from dheads.faces.head_pose import head_pose

_ALIGNMENT = AlignmentConfig()
_JAW = np.arange(4, 13)  # the part of the jaw line that moves with the mouth
_RIGID = np.setdiff1d(np.arange(68), [*MOUTH, *_JAW])


# ---- Signals (F,) ----


def slope(a: np.ndarray, b: np.ndarray) -> float:
    """The slope of the least-squares line of signal `a` over signal `b`, over their common frames."""
    count = min(len(a), len(b))
    both = np.isfinite(a[:count]) & np.isfinite(b[:count])
    if both.sum() < 2:
        return float("nan")
    a, b = a[:count][both], b[:count][both] - b[:count][both].mean()
    # sum (a - mean a) (b - mean b) / sum (b - mean b)^2
    return float(a @ b / (b @ b)) if b @ b > 1e-12 else float("nan")


def spread(signal: np.ndarray) -> float:
    """The 95th minus the 5th percentile of a signal."""
    low, high = np.nanpercentile(signal, [5, 95])
    return float(high - low)


def by_second(values: np.ndarray) -> list[float]:
    """The mean of values (F,) in each second, including an incomplete last one; NaN for a second without values."""
    seconds = (values[begin : begin + FPS] for begin in range(0, len(values), FPS))
    return [float(found.mean()) if len(found := part[np.isfinite(part)]) else float("nan") for part in seconds]


# ---- Blinks ----


def blinks(openness: np.ndarray, closed: float = 0.75, shortest: int = 2) -> list[tuple[int, int]]:
    """First and last frame of every blink, by the openness (F,) of the eyes.

    A blink is `shortest` frames or more below `closed` times the median openness of the clip, so that narrow eyes do
    not count as shut. NaN (no face) counts as open. Of 67 blinks marked by eye in 20 clips, this finds 62 in the
    openness of `dheads.faces.eyelids`, and one false one (a laugh).
    """
    shut = openness < closed * np.nanmedian(openness) if np.isfinite(openness).any() else np.zeros(len(openness), bool)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], shut, [0]]).astype(int)))
    return [(int(i), int(j) - 1) for i, j in zip(edges[::2], edges[1::2], strict=True) if j - i >= shortest]


def blinks_per_second(openness: np.ndarray) -> float:
    """Blinks per second, by the openness (F,) of the eyes; NaN if no frame has a face."""
    return len(blinks(openness)) * FPS / len(openness) if np.isfinite(openness).any() else float("nan")


def blink_seconds(openness: np.ndarray) -> float:
    """The mean length of a blink in seconds, by the openness (F,) of the eyes; NaN without a blink."""
    lengths = [last - first + 1 for first, last in blinks(openness)]
    return float(np.mean(lengths)) / FPS if lengths else float("nan")


# ---- Head motion ----


def clip_poses(landmarks: np.ndarray) -> np.ndarray:
    """The poses (F, 6) of the head in a video with landmarks (F, 68, 2) px, in the order of POSE.

    One similarity for the whole video, that of its mean landmarks to the mean face, defines the crop, so that the
    motion is all that a viewer sees.
    """
    face = mean_face(_ALIGNMENT, 1)[STABLE].astype(np.float64)
    matrix = fit_similarity(np.nanmean(landmarks[:, STABLE].astype(np.float64), axis=0), face)
    with np.errstate(invalid="ignore"):  # frames without a face
        return head_pose(apply_transform(matrix, landmarks), _ALIGNMENT, 1)


def pose_range(poses: np.ndarray) -> np.ndarray:
    """The standard deviation (6,) of poses (F, 6) over time."""
    deviation: np.ndarray = np.nanstd(poses, axis=0)
    return deviation


def pose_speed(poses: np.ndarray) -> np.ndarray:
    """The root mean square (6,) of the changes of poses (F, 6) from frame to frame."""
    if len(poses) < 2:
        return np.full(poses.shape[1], np.nan)
    # Landmark noise moves it less than the mean absolute change.
    speed: np.ndarray = np.sqrt(np.nanmean(np.square(np.diff(poses, axis=0)), axis=0))
    return speed


# ---- Pictures ----


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two frames (H, W, 3) uint8, mean over R, G and B; 1 for equal ones.

    As Wang et al. (2004) define it: a Gaussian window of sigma 1.5 px, K1 0.01, K2 0.03. H and W are 11 or more.
    """
    return float(
        structural_similarity(  # type: ignore[no-untyped-call]
            a, b, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two frames (H, W, 3) uint8 in dB; at most 100, which is that of equal frames."""
    mse = np.square(a.astype(np.float64) - b).mean()
    # PSNR = 10 log10(255^2 / MSE)
    return float(min(100.0, 10 * np.log10(255**2 / max(mse, 1e-9))))


def sharpness(crop: np.ndarray, points: np.ndarray) -> float:
    """Variance of the Laplacian of the mouth region, in gray, of a crop (S, S, 3) uint8 with landmarks (68, 2) px."""
    x0, y0, x1, y1 = mouth_box(points, len(crop))
    laplacian = cv2.Laplacian(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.CV_64F)
    return float(laplacian[y0:y1, x0:x1].var())


def face_colour(crop: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Mean colour (3,), 0 to 255, of a crop (S, S, 3) uint8 within the hull of landmarks (68, 2) px."""
    mask = cv2.fillConvexPoly(np.zeros(crop.shape[:2], np.uint8), cv2.convexHull(face.round().astype(np.int32)), 1)
    return np.array(cv2.mean(crop, mask)[:3])


def colour_drift(colours: np.ndarray) -> float:
    """Absolute difference between the mean colours (N, 3) of the last and the first second, mean over R, G and B."""
    first, last = _first_and_last(colours)
    return float(np.abs(last.mean(axis=0) - first.mean(axis=0)).mean())


def colour_change(colours: np.ndarray) -> np.ndarray:
    """Absolute difference (F,) of colours (F, 3) from their mean in the first second, mean over R, G and B.

    NaN in frames without a face.
    """
    first, _ = _first_and_last(colours[np.isfinite(colours).all(axis=1)])
    change: np.ndarray = np.abs(colours - first.mean(axis=0)).mean(axis=1)
    return change


# ---- Landmarks ----


def face_shapes(landmarks: np.ndarray) -> np.ndarray:
    """Landmarks (F, 68, 2) px aligned to the mean face, each frame by itself, in eye distances."""
    unit = replace(_ALIGNMENT, eye_distance=1.0, smooth_frames=0.0)
    matrices = align_transforms(landmarks, unit, 1)
    return np.stack([apply_transform(matrix, points) for matrix, points in zip(matrices, landmarks, strict=True)])


def shape_distance(shapes: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean distance (...) of shapes (..., 68, 2) from others, over the landmarks other than the mouth and lower jaw."""
    distance: np.ndarray = np.linalg.norm(shapes[..., _RIGID, :] - other[..., _RIGID, :], axis=-1).mean(axis=-1)
    return distance


def landmark_drift(shapes: np.ndarray) -> float:
    """Distance between the mean shapes (N, 68, 2) of the last and the first second, in eye distances."""
    first, last = _first_and_last(shapes)
    return float(shape_distance(last.mean(axis=0), first.mean(axis=0)))


def lmd(a: np.ndarray, b: np.ndarray, size: int) -> float:
    """Distance of the mouth landmarks of two videos in px at 128 (Chen et al. 2018); 0 for equal ones.

    LMD = mean over frames and mouth landmarks of |a - b|, the mouths of each frame centred first. a and b are
    landmarks (F, 68, 2) px in aligned crops of `size` px; frames in which one has no face are ignored.
    """
    mouths = [points[:, MOUTH] - points[:, MOUTH].mean(axis=1, keepdims=True) for points in (a, b)]  # (F, 20, 2)
    distances = np.linalg.norm(mouths[0] - mouths[1], axis=-1).mean(axis=-1)  # (F,)
    found = distances[np.isfinite(distances)]
    return float(found.mean() * 128 / size) if len(found) else float("nan")


def _first_and_last(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last second; the two halves of a clip shorter than two seconds."""
    count = max(1, min(FPS, len(frames) // 2))
    return frames[:count], frames[-count:]
