"""The measures of a generated face and the real one that need no network but the packaged ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dheads.config import FPS
from dheads.evaluation.flow import smoothness
from dheads.evaluation.footage import Footage, aligned, crop_side
from dheads.evaluation.measures import (
    blink_seconds,
    blinks_per_second,
    by_second,
    clip_poses,
    colour_change,
    colour_drift,
    face_colour,
    face_shapes,
    landmark_drift,
    lmd,
    pose_range,
    pose_speed,
    psnr,
    shape_distance,
    sharpness,
    spread,
    ssim,
)
from dheads.faces.alignment import mouth_opening
from dheads.faces.eyelids import eye_openness
from dheads.faces.head_pose import POSE
from dheads.speech.sync import correlation, lag

_REACH = 5  # frames, of the mouth's offset


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`. Measures without a value are absent."""

    values: dict[str, float]  # keys with the prefix `true_`: of the real video alone
    curves: dict[str, list[float]]  # one value per second; NaN in seconds without one


def compare(generated: Footage, reference: Footage, moving: np.ndarray | None = None) -> Comparison:
    """Compare a generated video with a real one of the same number of frames, at the generated one's scale.

    moving: landmarks (F, 68, 2) px of the real clip in which its head moves as it does for a viewer; by default those
    of `reference`.
    """
    scale = generated.eye_distance  # for both, so that neither gains by being larger
    (ours, real), likeness = _side_by_side(generated, reference, scale)
    shapes, true_shapes = face_shapes(generated.landmarks), face_shapes(reference.landmarks)
    identity = true_shapes[reference.seen][0]
    opening, true_opening = mouth_opening(generated.landmarks), mouth_opening(reference.landmarks)
    values = {
        "frames": len(generated.landmarks),
        "mouth_correlation": correlation(opening, true_opening),
        "mouth_offset_frames": lag(opening, true_opening, _REACH).frames,
        "mouth_range_ratio": spread(opening) / (spread(true_opening) or np.nan),
        "mouth_sharpness": _ratio(_mean(ours.sharpness), _mean(real.sharpness)),
        "ssim": _mean(likeness[:, 0]),
        "psnr": _mean(likeness[:, 1]),
        "lmd": lmd(ours.points, real.points, crop_side(scale)),
        **_alone(generated, shapes, identity, ours.colours),
        **smoothness(generated.read()),
        **_true(_alone(reference, true_shapes, identity, real.colours)),
        **_true(smoothness(reference.read())),
        **head_motion(generated.landmarks),
        **_true(head_motion(reference.landmarks if moving is None else moving)),
    }
    values |= head_shares(values)
    curves = {
        "sharpness": [_ratio(*pair) for pair in zip(by_second(ours.sharpness), by_second(real.sharpness), strict=True)],
        "colour": by_second(colour_change(ours.colours)),
        "identity_shape": by_second(shape_distance(shapes, identity)),
        "mouth_correlation": [
            correlation(opening[begin : begin + FPS], true_opening[begin : begin + FPS])
            for begin in range(0, len(opening), FPS)
        ],
    }
    return Comparison(_finite(values), curves)


def head_motion(landmarks: np.ndarray) -> dict[str, float]:
    """Range and speed of the six pose numbers of a head with landmarks (F, 68, 2) px."""
    poses = clip_poses(landmarks)
    properties = {"head_range": pose_range(poses), "head_speed": pose_speed(poses)}
    return {f"{name}_{number}": values[i] for name, values in properties.items() for i, number in enumerate(POSE)}


def head_shares(values: dict[str, float]) -> dict[str, float]:
    """The summaries of range and speed among the values of a clip, or among means over clips; NaN without them all."""
    shares = {}
    for name in ("head_range", "head_speed"):
        keys = [f"{name}_{number}" for number in POSE]
        parts = np.array([_ratio(values.get(key, np.nan), values.get(f"true_{key}", np.nan)) for key in keys])
        # (product of the ratios)^(1/6)
        shares[name] = float(np.prod(parts) ** (1 / len(parts)))
    return shares


@dataclass(frozen=True, eq=False)
class _CropValues:
    """Properties of a video's aligned crops; NaN in frames without a face."""

    points: np.ndarray  # (F, 68, 2) px
    sharpness: np.ndarray  # (F,) of the mouth
    colours: np.ndarray  # (F, 3) of the face


def _side_by_side(
    generated: Footage, reference: Footage, scale: float
) -> tuple[tuple[_CropValues, _CropValues], np.ndarray]:
    """The crops of both videos, and (F, 2) SSIM and PSNR of their frames; both videos are read in step."""
    (points, crops), (true_points, true_crops) = (aligned(video, scale) for video in (generated, reference))
    face, true_face = _mean_points(points), _mean_points(true_points)
    rows, true_rows, likeness = [], [], []
    for crop, row, true_crop, true_row in zip(crops, points, true_crops, true_points, strict=True):
        rows.append(_sharpness_and_colour(crop, row, face))
        true_rows.append(_sharpness_and_colour(true_crop, true_row, true_face))
        if crop is None or true_crop is None:
            likeness.append((np.nan, np.nan))
        else:
            likeness.append((ssim(crop, true_crop), psnr(crop, true_crop)))
    return (_crop_values(points, rows), _crop_values(true_points, true_rows)), np.array(likeness)


def _sharpness_and_colour(crop: np.ndarray | None, points: np.ndarray, face: np.ndarray) -> np.ndarray:
    """(4,): the sharpness of the mouth, and the mean colour within the landmarks `face`; NaN without a crop."""
    if crop is None:
        return np.full(4, np.nan)
    return np.append(sharpness(crop, points), face_colour(crop, face))


def _crop_values(points: np.ndarray, rows: list[np.ndarray]) -> _CropValues:
    table = np.stack(rows)  # (F, 4)
    return _CropValues(points, table[:, 0], table[:, 1:])


def _mean_points(points: np.ndarray) -> np.ndarray:
    """The mean landmarks (68, 2) of (F, 68, 2), over the frames with a face."""
    mean: np.ndarray = np.nanmean(points, axis=0)
    return mean


def _alone(video: Footage, shapes: np.ndarray, identity: np.ndarray, colours: np.ndarray) -> dict[str, float]:
    """The measures that a video has without the other one."""
    openness = eye_openness(video.read(), video.landmarks)
    return {
        "identity_shape": _mean(shape_distance(shapes, identity)),
        "landmark_drift": landmark_drift(shapes[video.seen]),
        "colour_drift": colour_drift(colours[video.seen]),
        "blinks_per_second": blinks_per_second(openness),
        "blink_seconds": blink_seconds(openness),
    }


def _true(values: dict[str, float]) -> dict[str, float]:
    return {f"true_{name}": value for name, value in values.items()}


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _ratio(value: float, truth: float) -> float:
    return float(value / truth) if truth else float("nan")


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}
