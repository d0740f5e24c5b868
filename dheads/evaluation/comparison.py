"""What can be measured of a generated face and the real one without any further network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dheads.config import FPS
from dheads.evaluation.flow import smoothness
from dheads.evaluation.footage import Footage, aligned, crop_side
from dheads.evaluation.measures import (
    best_offset,
    blink_seconds,
    blinks_per_second,
    by_second,
    colour_change,
    colour_drift,
    correlation,
    face_colour,
    face_shapes,
    landmark_drift,
    lmd,
    psnr,
    shape_distance,
    sharpness,
    spread,
    ssim,
)
from dheads.faces.alignment import mouth_opening
from dheads.faces.eyelids import eye_openness


@dataclass(frozen=True)
class Pair:
    """A generated clip and the real one, of as many frames."""

    clip: str  # its name
    generated: Footage
    reference: Footage
    paths: tuple[Path, Path]  # of the two videos

    def sides(self) -> Iterator[tuple[str, Footage, Path]]:
        """The prefix of its measures, the footage and the file of each."""
        yield "", self.generated, self.paths[0]
        yield "true_", self.reference, self.paths[1]


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds. A measure that has no value is absent."""

    values: dict[str, float]  # those of the real video alone begin with `true_`
    curves: dict[str, list[float]]  # one value a second; NaN where a second has none


def compare(generated: Footage, reference: Footage) -> Comparison:
    """A generated video beside the real one of as many frames, at the scale of the generated one."""
    scale = generated.eye_distance  # for both, so that neither gains by being larger
    (ours, real), likeness = _side_by_side(generated, reference, scale)
    shapes, true_shapes = face_shapes(generated.landmarks), face_shapes(reference.landmarks)
    identity = true_shapes[reference.seen][0]
    opening, true_opening = mouth_opening(generated.landmarks), mouth_opening(reference.landmarks)
    values = {
        "frames": len(generated.landmarks),
        "mouth_correlation": correlation(opening, true_opening),
        "mouth_offset_frames": best_offset(opening, true_opening),
        "mouth_range_ratio": spread(opening) / (spread(true_opening) or np.nan),
        "mouth_sharpness": _ratio(_mean(ours.sharpness), _mean(real.sharpness)),
        "ssim": _mean(likeness[:, 0]),
        "psnr": _mean(likeness[:, 1]),
        "lmd": lmd(ours.points, real.points, crop_side(scale)),
        **_alone(generated, shapes, identity, ours.colours),
        **smoothness(generated.read()),
        **_true(_alone(reference, true_shapes, identity, real.colours)),
        **_true(smoothness(reference.read())),
    }
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


def describe(video: Footage) -> dict[str, float]:
    """The measures of one video by itself; its identity is that of its first frame."""
    points, crops = aligned(video, video.eye_distance)
    face = _middle(points)
    view = _view(points, [_look(crop, row, face) for crop, row in zip(crops, points, strict=True)])
    shapes = face_shapes(video.landmarks)
    return _finite(_alone(video, shapes, shapes[video.seen][0], view.colours))


@dataclass(frozen=True, eq=False)
class _View:
    """What a video's aligned crops show; NaN in frames without a face."""

    points: np.ndarray  # (F, 68, 2) px
    sharpness: np.ndarray  # (F,) of the mouth
    colours: np.ndarray  # (F, 3) of the face


def _side_by_side(generated: Footage, reference: Footage, scale: float) -> tuple[tuple[_View, _View], np.ndarray]:
    """What each video shows, and the likeness (F, 2) of their frames: SSIM and PSNR. Both are read at once."""
    (points, crops), (true_points, true_crops) = (aligned(video, scale) for video in (generated, reference))
    face, true_face = _middle(points), _middle(true_points)
    looks, true_looks, likeness = [], [], []
    for crop, row, true_crop, true_row in zip(crops, points, true_crops, true_points, strict=True):
        looks.append(_look(crop, row, face))
        true_looks.append(_look(true_crop, true_row, true_face))
        seen = crop is not None and true_crop is not None
        likeness.append((ssim(crop, true_crop), psnr(crop, true_crop)) if seen else (np.nan, np.nan))
    return (_view(points, looks), _view(true_points, true_looks)), np.array(likeness)


def _look(crop: np.ndarray | None, points: np.ndarray, face: np.ndarray) -> np.ndarray:
    """(4,): sharpness of the mouth, and the mean colour within the clip's mean landmarks; NaN without a crop."""
    if crop is None:
        return np.full(4, np.nan)
    return np.append(sharpness(crop, points), face_colour(crop, face))


def _view(points: np.ndarray, looks: list[np.ndarray]) -> _View:
    rows = np.stack(looks)  # (F, 4)
    return _View(points, rows[:, 0], rows[:, 1:])


def _middle(points: np.ndarray) -> np.ndarray:
    """The mean landmarks (68, 2) of (F, 68, 2)."""
    return np.nanmean(points, axis=0)


def _alone(video: Footage, shapes: np.ndarray, identity: np.ndarray, colours: np.ndarray) -> dict[str, float]:
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
    found = values[np.isfinite(values)]
    return float(found.mean()) if len(found) else float("nan")


def _ratio(value: float, truth: float) -> float:
    return float(value / truth) if truth else float("nan")


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}
