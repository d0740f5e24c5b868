"""`dheads eval`: how generated videos compare with the real ones of the same names.

Every measure is a pure function of landmarks (F, 68, 2) or of aligned crops (F, S, S, 3); rows of NaN are frames in
which no face was found, and count nowhere. A measure that has no value, such as a ratio to nothing, is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from dheads.config import FPS, AlignmentConfig
from dheads.errors import DheadsError
from dheads.faces import (
    MOUTH,
    align_transforms,
    apply_transform,
    eye_distance,
    eye_openness,
    mouth_box,
    mouth_opening,
    warp,
)
from dheads.landmarks import LandmarkBackend, load_backend
from dheads.video import VIDEOS, read_frames

MAX_MISSING = 0.2  # share of the frames in which the face may be lost
_ALIGNMENT = AlignmentConfig()
_JAW = np.arange(4, 13)  # the part of the jaw line that moves with the mouth
_RIGID = np.setdiff1d(np.arange(68), [*MOUTH, *_JAW])


@dataclass(frozen=True)
class Report:
    """What `evaluate` found. A measure without a value is absent from its row."""

    per_clip: list[dict[str, float | str]]  # `clip` and the measures
    summary: dict[str, float]  # number of clips and of failed ones, and every measure's mean
    failed: list[tuple[str, str]] = field(default_factory=list)  # (clip, reason)


def evaluate(generated: Path, reference: Path, *, size: int | None = None, progress: bool = True) -> Report:
    """Compare videos with the real ones: two files, or two folders whose videos have the same names.

    Pictures are compared at the scale of the generated ones. Where these were enlarged after they were made, `size` is
    the side in px before that (going there and back still costs a fifth of the sharpness). A video that cannot be
    measured is listed in `failed`.
    Raises DheadsError when there is nothing to compare, or nothing could be.
    """
    pairs, failed = find_pairs(generated, reference)
    backend = load_backend(_ALIGNMENT.landmarks)
    rows: list[dict[str, float | str]] = []
    for name, ours, real in tqdm(pairs, desc="eval", unit="clip", disable=not progress):
        try:
            footage = [watch(str(path), partial(read_frames, path), backend) for path in (ours, real)]
            values = compare(*footage, size)
        except DheadsError as error:
            failed.append((name, str(error)))
        else:
            rows.append({"clip": name, **values})
    if not rows:
        raise DheadsError(f"{generated}: none of its {len(pairs)} videos could be measured; the last: {failed[-1][1]}")
    return Report(rows, {"clips": len(rows), "failed": len(failed), **mean_values(rows)}, sorted(failed))


def find_pairs(generated: Path, reference: Path) -> tuple[list[tuple[str, Path, Path]], list[tuple[str, str]]]:
    """(name, generated, real) of every pair, and (name, reason) of the generated videos without a real one."""
    if generated.is_file() and reference.is_file():
        return [(generated.stem, generated, reference)], []
    ours, real = _videos(generated), _videos(reference)
    pairs = [(name, path, real[name]) for name, path in ours.items() if name in real]
    if not pairs:
        raise DheadsError(f"{generated}: none of its {len(ours)} videos has the name of one in {reference}")
    return pairs, [(name, f"no video of that name in {reference}") for name in ours if name not in real]


def _videos(folder: Path) -> dict[str, Path]:
    """The videos below a folder by their path in it, without the ending."""
    if not folder.is_dir():
        raise DheadsError(f"{folder}: is no folder; give two folders of videos, or two videos")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS and path.is_file())
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def mean_values(rows: Iterable[dict[str, float | str]]) -> dict[str, float]:
    """The mean of every measure over the rows that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if not isinstance(value, str):
                found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


# ---- Videos ----


@dataclass(frozen=True)
class Footage:
    """One person's face throughout a video. Raises DheadsError where it is lost in more than a fifth of the frames."""

    name: str  # for messages
    read: Callable[[], Iterable[np.ndarray]]  # starts the video: (H, W, 3) uint8 frames
    landmarks: np.ndarray  # (F, 68, 2) px
    eye_distance: float  # its median, px
    side: int  # the video's longer side, px

    def __post_init__(self) -> None:
        missing = len(self.landmarks) - len(_found(self.landmarks))
        if missing > MAX_MISSING * len(self.landmarks) or not len(self.landmarks):
            raise DheadsError(f"{self.name}: no face in {missing} of {len(self.landmarks)} frames")


def watch(name: str, read: Callable[[], Iterable[np.ndarray]], backend: LandmarkBackend) -> Footage:
    """Follow the largest face of a video."""
    sides: list[int] = []

    def noted() -> Iterator[np.ndarray]:
        for frame in read():
            sides.append(max(frame.shape[:2]))
            yield frame

    landmarks = backend.track(noted())
    found = eye_distance(_found(landmarks))
    return Footage(name, read, landmarks, float(np.median(found)) if len(found) else 0.0, max(sides, default=0))


def compare(generated: Footage, reference: Footage, size: int | None = None) -> dict[str, float]:
    """All measures of a generated video over the common frames; those of the real one alone begin with `true_`.

    size: as in `evaluate`.
    """
    count = min(len(generated.landmarks), len(reference.landmarks))
    generated, reference = shortened(generated, count), shortened(reference, count)
    if size is not None:
        generated = resized(generated, size)
    scale = generated.eye_distance  # for both, so that neither gains by being larger
    identity = _found(face_shapes(reference.landmarks))[0]
    ours, real = describe(generated, identity, scale), describe(reference, identity, scale)
    opening, true_opening = mouth_opening(generated.landmarks), mouth_opening(reference.landmarks)
    values = {
        "frames": count,
        "mouth_correlation": correlation(opening, true_opening),
        "mouth_offset_frames": best_offset(opening, true_opening),
        "mouth_range_ratio": spread(opening) / (spread(true_opening) or np.nan),
        "mouth_sharpness": ours.pop("sharpness") / (real.pop("sharpness") or np.nan),
        **ours,
        **{f"true_{name}": value for name, value in real.items()},
    }
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


def describe(video: Footage, identity: np.ndarray | None = None, scale: float | None = None) -> dict[str, float]:
    """The measures of one video by itself.

    identity: a face's shape (68, 2) as `face_shapes` gives it, by default the first frame's. scale: the eye distance in
    px at which pictures are compared, by default the video's own.
    """
    shapes = _found(face_shapes(video.landmarks))
    crops, points = aligned(video, scale or video.eye_distance)
    return {
        "sharpness": sharpness(crops, points),
        "identity_shape": float(shape_distance(shapes, shapes[0] if identity is None else identity).mean()),
        "landmark_drift": landmark_drift(shapes),
        "colour_drift": colour_drift(crops, points),
        "blinks_per_second": blinks_per_second(eye_openness(video.landmarks)),
    }


def aligned(video: Footage, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Crops (N, S, S, 3) uint8 in which the eyes are `scale` px apart, and their landmarks (N, 68, 2) px.

    Frames without a face are left out.
    """
    size = max(16, round(scale / _ALIGNMENT.eye_distance))
    matrices = align_transforms(video.landmarks, _ALIGNMENT, size)
    crops, points = [], []
    for frame, matrix, row in zip(video.read(), matrices, video.landmarks, strict=True):
        if np.isfinite(matrix).all():
            crops.append(warp(frame, matrix, size))
            points.append(apply_transform(matrix, row))
    return np.stack(crops), np.stack(points)


def shortened(video: Footage, count: int) -> Footage:
    """The video's first frames."""
    return replace(video, read=lambda: islice(video.read(), count), landmarks=video.landmarks[:count])


def resized(video: Footage, side: int) -> Footage:
    """The video with a longer side of `side` px, averaged over areas."""
    factor = side / video.side

    def frames() -> Iterator[np.ndarray]:
        for frame in video.read():
            yield cv2.resize(frame, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)

    # Lengths count from the picture's edge, points from the centre of its first pixel.
    points = (video.landmarks + 0.5) * factor - 0.5
    return Footage(video.name, frames, points, video.eye_distance * factor, side)


def _found(rows: np.ndarray) -> np.ndarray:
    """The frames (N, 68, 2) in which there is a face."""
    return rows[np.isfinite(rows).all(axis=(1, 2))]


# ---- Measures ----


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two signals over their common frames; 0 where one of them does not move."""
    count = min(len(a), len(b))
    both = np.isfinite(a[:count]) & np.isfinite(b[:count])
    if both.sum() < 2:
        return float("nan")
    a, b = a[:count][both] - a[:count][both].mean(), b[:count][both] - b[:count][both].mean()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm > 1e-9 else 0.0


def best_offset(a: np.ndarray, b: np.ndarray, reach: int = 5) -> int:
    """By how many frames, -5 to 5, signal `a` comes late: the shift that correlates best. Of equals, the smallest."""
    shifts = sorted(range(-reach, reach + 1), key=abs)
    return max(shifts, key=lambda k: np.nan_to_num(correlation(a[max(k, 0) :], b[max(-k, 0) :]), nan=-1.0))


def spread(signal: np.ndarray) -> float:
    """Its 95th less its 5th percentile."""
    low, high = np.nanpercentile(signal, [5, 95])
    return float(high - low)


def sharpness(crops: np.ndarray, landmarks: np.ndarray) -> float:
    """Variance of the Laplacian of the gray mouth region, mean over the frames.

    crops (N, S, S, 3) uint8, landmarks (N, 68, 2) px in them.
    """
    variances = []
    for crop, (x0, y0, x1, y1) in zip(crops, mouth_box(landmarks, crops.shape[1]), strict=True):
        laplacian = cv2.Laplacian(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.CV_64F)
        variances.append(laplacian[y0:y1, x0:x1].var())
    return float(np.mean(variances))


def face_shapes(landmarks: np.ndarray) -> np.ndarray:
    """Landmarks (F, 68, 2) px laid on the mean face, each frame by itself, in eye distances."""
    unit = replace(_ALIGNMENT, eye_distance=1.0, smooth_frames=0.0)
    matrices = align_transforms(landmarks, unit, 1)
    return np.stack([apply_transform(matrix, points) for matrix, points in zip(matrices, landmarks, strict=True)])


def shape_distance(shapes: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean distance (...) of the landmarks that speech does not move: neither mouth nor lower jaw."""
    return np.linalg.norm(shapes[..., _RIGID, :] - other[..., _RIGID, :], axis=-1).mean(axis=-1)


def landmark_drift(shapes: np.ndarray) -> float:
    """Distance of the mean of shapes (N, 68, 2) in the last second from that in the first, in eye distances."""
    first, last = _first_and_last(shapes)
    return float(shape_distance(last.mean(axis=0), first.mean(axis=0)))


def colour_drift(crops: np.ndarray, landmarks: np.ndarray) -> float:
    """Absolute difference of the face's mean colour in the last second and the first, of 0 to 255, mean of R, G, B.

    The face is the hull of the clip's mean landmarks. crops (N, S, S, 3) uint8, landmarks (N, 68, 2) px in them.
    """
    hull = cv2.convexHull(landmarks.mean(axis=0).round().astype(np.int32))
    mask = cv2.fillConvexPoly(np.zeros(crops.shape[1:3], np.uint8), hull, 1).astype(bool)
    first, last = (part[:, mask].mean(axis=(0, 1)) for part in _first_and_last(crops))
    return float(np.abs(last - first).mean())


def _first_and_last(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last second; of a clip under two seconds, its halves."""
    count = max(1, min(FPS, len(frames) // 2))
    return frames[:count], frames[-count:]


def blinks_per_second(openness: np.ndarray, closed: float = 0.9, shortest: int = 2) -> float:
    """How often the eyes' openness falls below that share of its median for that many frames or more.

    The packaged mesh follows eyelids weakly: it gives shut eyes 0.8 to 0.95 of the open eyes' openness, misses many
    blinks and takes some downward looks for one. Read the figure beside the real clip's only.
    """
    shut = openness < closed * np.nanmedian(openness)  # NaN compares as open
    edges = np.flatnonzero(np.diff(np.concatenate([[0], shut, [0]]).astype(int)))
    lengths = edges[1::2] - edges[::2]
    return float((lengths >= shortest).sum() * FPS / len(openness))
