"""Measures in closed form, and on real clips against spoilt copies of themselves."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dheads.config import AlignmentConfig
from dheads.errors import DheadsError
from dheads.evaluate import (
    Footage,
    Report,
    aligned,
    best_offset,
    blinks_per_second,
    colour_drift,
    compare,
    correlation,
    describe,
    evaluate,
    face_shapes,
    find_pairs,
    landmark_drift,
    mean_values,
    resized,
    shape_distance,
    sharpness,
    spread,
    watch,
)
from dheads.faces import eye_distance, mean_face, mouth_opening
from dheads.landmarks import load_backend
from dheads.video import read_frames, write_clip

RNG = np.random.default_rng(0)
FACE = mean_face(AlignmentConfig(), 128)
FRAMES, LATE = 40, 3


# ---- Closed form ----


def test_correlation() -> None:
    signal = RNG.standard_normal(50)
    assert correlation(3 * signal + 2, signal) == pytest.approx(1)
    assert correlation(-signal, signal[:40]) == pytest.approx(-1)  # over the common frames
    assert correlation(np.array([1.0, 2, 3]), np.array([1.0, 3, 2])) == pytest.approx(0.5)
    lost = signal.copy()
    lost[7] = np.nan
    assert correlation(lost, signal) == pytest.approx(1)
    assert correlation(np.full(50, 0.3), signal) == 0  # a frozen mouth does not follow
    assert np.isnan(correlation(np.full(50, np.nan), signal))


@pytest.mark.parametrize("late", [-5, -2, 0, 1, 4])
def test_best_offset(late: int) -> None:
    signal = np.convolve(RNG.standard_normal(80), np.ones(3), "same")
    assert best_offset(signal[10 - late : 70 - late], signal[10:70]) == late


def test_offset_of_a_still_mouth_is_none() -> None:
    assert best_offset(np.zeros(60), RNG.standard_normal(60)) == 0


def test_spread() -> None:
    assert spread(np.r_[np.arange(101.0), np.nan]) == pytest.approx(90)


def test_sharpness() -> None:
    y, x = np.mgrid[:128, :128]
    board = np.where((x + y) % 2, 200, 100).astype(np.uint8)
    crops = np.repeat(np.repeat(board[None, ..., None], 3, axis=-1), 2, axis=0)
    landmarks = np.stack([FACE, FACE])
    # Each pixel differs by 100 from its four neighbours: +-400.
    assert sharpness(crops, landmarks) == pytest.approx(400**2, rel=1e-3)
    assert sharpness(np.full_like(crops, 77), landmarks) == 0
    elsewhere = np.full_like(crops, 77)
    elsewhere[:, :50] = crops[:, :50]  # the eyes
    assert sharpness(elsewhere, landmarks) == 0


def test_shapes_do_not_depend_on_place_size_and_angle() -> None:
    angle = 0.4
    turned = 2.5 * FACE @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) + (40, 9)
    shapes = face_shapes(np.stack([FACE, turned, np.full((68, 2), np.nan)]))
    np.testing.assert_allclose(shapes[1], shapes[0], atol=1e-5)
    assert np.isnan(shapes[2]).all()
    assert eye_distance(shapes[0]) == pytest.approx(1, abs=1e-4)


def test_shape_distance_leaves_out_the_mouth_and_the_lower_jaw() -> None:
    shape, other = face_shapes(FACE[None])[0], face_shapes(FACE[None])[0]
    other[48:] += 1
    other[4:13] += 1
    assert shape_distance(other, shape) == 0
    other[27] += (0.3, 0.4)
    assert shape_distance(other, shape) == pytest.approx(0.5 / 39)


def test_landmark_drift() -> None:
    still = np.repeat(face_shapes(FACE[None]), 100, axis=0)
    jitter = 0.05 * (-1.0) ** np.arange(100)[:, None, None]
    moved = still.copy()
    moved[75:] += (0.03, 0.04)
    assert landmark_drift(still) == 0
    assert landmark_drift(moved) == pytest.approx(0.05)
    assert landmark_drift(moved[50:]) == pytest.approx(0.05)  # exactly two seconds
    assert landmark_drift(still[:30] + jitter[:30]) == pytest.approx(0.1 / 15 * 2**0.5, rel=1e-3)  # halves of 15 frames


def test_colour_drift() -> None:
    crops = np.full((75, 128, 128, 3), 100, np.uint8)
    landmarks = np.repeat(FACE[None], 75, axis=0)
    assert colour_drift(crops, landmarks) == 0
    crops[50:] += np.uint8([12, 0, 3])
    assert colour_drift(crops, landmarks) == pytest.approx(5)
    crops[:25] = 100
    crops[50:] = 100
    crops[50:, :20] = 255  # above the face
    assert colour_drift(crops, landmarks) == 0


def test_blinks_per_second() -> None:
    openness = np.full(100, 0.3)  # 4 s
    openness[10:13] = openness[50:52] = openness[97:] = 0.1
    openness[70] = 0.1  # one frame is no blink
    openness[80] = np.nan
    assert blinks_per_second(openness) == pytest.approx(3 / 4)
    assert blinks_per_second(np.full(50, 0.1)) == 0  # narrow eyes are not shut


def test_mean_values_are_over_the_rows_that_have_them() -> None:
    assert mean_values([{"clip": "a", "x": 1.0, "y": 2.0}, {"clip": "b", "x": 2.0}]) == {"x": 1.5, "y": 2.0}


# ---- Real clips ----


@pytest.fixture(scope="module")
def frames(shared: Path) -> np.ndarray:
    clip = shared / "data" / "hdtf" / "WDA_BobMenendez_000.mp4"
    return np.stack(list(islice(read_frames(clip), FRAMES + LATE)))


@pytest.fixture(scope="module")
def truth(frames: np.ndarray) -> Footage:
    video = frames[LATE:]
    return watch("truth", lambda: video, load_backend("mesh"))


@pytest.fixture(scope="module")
def folders(frames: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Generated and real videos. The real one is what `truth` sees."""
    generated, reference = tmp_path_factory.mktemp("generated"), tmp_path_factory.mktemp("reference")
    late, real = frames[:FRAMES], frames[LATE:]
    silence = torch.zeros(16_000)
    for name, video in {"late": late, "frozen": real[:1].repeat(FRAMES, axis=0), "short": real[:25]}.items():
        write_clip(generated / f"{name}.mp4", video, silence)
        write_clip(reference / f"{name}.mp4", real, silence)
    write_clip(generated / "faceless.mp4", np.full((3, 96, 96, 3), 90, np.uint8), silence)
    write_clip(generated / "unmatched.mp4", real[:3], silence)
    (generated / "broken.mp4").write_text("no video")
    (generated / "notes.txt").write_text("no video either")
    for name in ("faceless", "broken", "not_made"):
        write_clip(reference / f"{name}.mp4", real[:3], silence)
    return generated, reference


@pytest.fixture(scope="module")
def report(folders: tuple[Path, Path]) -> Report:
    return evaluate(*folders, progress=False)


def spoilt(truth: Footage, change) -> Footage:  # type: ignore[no-untyped-def]
    """The same face with other pixels: `change` takes a frame and its number."""
    video = [change(frame, index) for index, frame in enumerate(truth.read())]
    return replace(truth, read=lambda: video)


def test_a_clip_against_itself_is_perfect(truth: Footage) -> None:
    values = compare(truth, truth)
    assert values["mouth_correlation"] == pytest.approx(1)
    assert values["mouth_range_ratio"] == values["mouth_sharpness"] == 1
    assert values["mouth_offset_frames"] == 0
    for name in ("identity_shape", "landmark_drift", "colour_drift", "blinks_per_second"):
        assert values[name] == values[f"true_{name}"]
    assert 0 < values["identity_shape"] < 0.1
    assert spread(mouth_opening(truth.landmarks)) > 0.05  # the mouth does move


def test_blur_lowers_sharpness_alone(truth: Footage) -> None:
    blurred = compare(spoilt(truth, lambda frame, _: cv2.GaussianBlur(frame, (0, 0), 2.0)), truth)
    assert blurred["mouth_sharpness"] < 0.3
    assert blurred["mouth_correlation"] == pytest.approx(1)
    assert blurred["colour_drift"] == pytest.approx(blurred["true_colour_drift"], abs=0.5)


def test_noise_raises_sharpness(truth: Footage) -> None:
    def noisy(frame: np.ndarray, index: int) -> np.ndarray:
        noise = np.random.default_rng(index).normal(0, 12, frame.shape)
        return (frame + noise).clip(0, 255).astype(np.uint8)

    assert compare(spoilt(truth, noisy), truth)["mouth_sharpness"] > 1.5


def test_enlarging_is_not_sharpness(truth: Footage) -> None:
    """Frames made at half the size are as sharp as the truth at that size, however large the video."""
    side = truth.side
    half = resized(truth, side // 2)
    assert eye_distance(half.landmarks).max() == pytest.approx(eye_distance(truth.landmarks).max() / 2)
    enlarged = [cv2.resize(frame, (side, side), interpolation=cv2.INTER_LANCZOS4) for frame in half.read()]
    large = replace(truth, read=lambda: enlarged)
    assert compare(half, truth)["mouth_sharpness"] == pytest.approx(1, abs=0.2)
    assert compare(large, truth)["mouth_sharpness"] < 0.5
    assert compare(large, truth, side // 2)["mouth_sharpness"] == pytest.approx(0.8, abs=0.1)


def test_a_growing_tint_is_colour_drift(truth: Footage) -> None:
    def tinted(frame: np.ndarray, index: int) -> np.ndarray:
        return (frame * (1 - 0.01 * index)).round().astype(np.uint8)

    values = compare(spoilt(truth, tinted), truth)
    level = np.mean([crop.mean() for crop in aligned(truth, 30)[0]])
    assert values["colour_drift"] > values["true_colour_drift"] + 0.1 * level
    assert values["landmark_drift"] == values["true_landmark_drift"]


def test_another_shape_is_another_identity(truth: Footage) -> None:
    wider = replace(truth, landmarks=truth.landmarks * np.float32([1.15, 1]))
    assert compare(wider, truth)["identity_shape"] > compare(truth, truth)["identity_shape"] + 0.02
    assert describe(wider)["identity_shape"] == pytest.approx(compare(wider, wider)["identity_shape"])


def test_frames_without_a_face_count_nowhere(truth: Footage) -> None:
    gaps = truth.landmarks.copy()
    gaps[[5, 6, 20]] = np.nan
    values = compare(replace(truth, landmarks=gaps), truth)
    assert values["mouth_correlation"] == pytest.approx(1)
    assert values["mouth_sharpness"] == pytest.approx(1, abs=0.05)
    assert len(aligned(replace(truth, landmarks=gaps), 30)[0]) == FRAMES - 3
    gaps[:12] = np.nan
    with pytest.raises(DheadsError, match="truth: no face in 13 of 40 frames"):
        replace(truth, landmarks=gaps)


def test_a_late_mouth_is_found(report: Report) -> None:
    late = _row(report, "late")
    assert late["mouth_offset_frames"] == LATE
    assert late["mouth_correlation"] < 0.95


def test_a_frozen_mouth_is_found(report: Report) -> None:
    frozen = _row(report, "frozen")
    assert frozen["mouth_range_ratio"] < 0.05
    assert frozen["mouth_correlation"] < 0.4
    assert frozen["landmark_drift"] < 0.005 < frozen["true_landmark_drift"]


def test_the_common_frames_are_compared(report: Report) -> None:
    short = _row(report, "short")
    assert short["frames"] == 25
    assert short["mouth_correlation"] > 0.98
    assert short["mouth_range_ratio"] == pytest.approx(1, abs=0.02)
    assert short["mouth_sharpness"] == pytest.approx(1, abs=0.02)
    assert short["landmark_drift"] == pytest.approx(short["true_landmark_drift"], abs=1e-3)


def test_videos_that_cannot_be_measured_are_listed(report: Report, folders: tuple[Path, Path]) -> None:
    assert [row["clip"] for row in report.per_clip] == ["frozen", "late", "short"]
    reasons = dict(report.failed)
    assert set(reasons) == {"broken", "faceless", "unmatched"}
    assert "not a video" in reasons["broken"]
    assert reasons["faceless"] == f"{folders[0] / 'faceless.mp4'}: no face in 3 of 3 frames"
    assert reasons["unmatched"] == f"no video of that name in {folders[1]}"
    assert (report.summary["clips"], report.summary["failed"]) == (3, 3)
    assert report.summary["mouth_correlation"] == pytest.approx(
        np.mean([row["mouth_correlation"] for row in report.per_clip])
    )


def test_names_are_paths_below_the_folder(tmp_path: Path) -> None:
    for path in ("a/speaker/one.mp4", "a/two.mov", "b/speaker/one.avi", "b/one.mp4"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    pairs, failed = find_pairs(tmp_path / "a", tmp_path / "b")
    assert pairs == [("speaker/one", tmp_path / "a/speaker/one.mp4", tmp_path / "b/speaker/one.avi")]
    assert [name for name, _ in failed] == ["two"]


def test_nothing_to_compare(folders: tuple[Path, Path], tmp_path: Path) -> None:
    generated, reference = folders
    with pytest.raises(DheadsError, match="none of its 0 videos has the name of one in"):
        evaluate(tmp_path, reference, progress=False)
    with pytest.raises(DheadsError, match="is no folder"):
        evaluate(generated, tmp_path / "absent", progress=False)
    with pytest.raises(DheadsError, match=r"could be measured; .*no face in 3 of 3 frames"):
        evaluate(generated / "faceless.mp4", reference / "faceless.mp4", progress=False)


def _row(report: Report, clip: str) -> dict:
    return next(row for row in report.per_clip if row["clip"] == clip)
