"""Comparing footage: measures of changed pixels and landmarks, and frames without a face."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest

from dheads.errors import DheadsError
from dheads.evaluation.comparison import compare, head_shares
from dheads.evaluation.footage import Footage, Recording, aligned, resized, shortened, track_face
from dheads.faces.alignment import eye_distance
from dheads.faces.head_pose import POSE
from dheads.faces.landmarks import load_backend
from dheads.media.reading import read_frames

FRAMES = 32


@pytest.fixture(scope="module")
def clip(shared: Path) -> Path:
    return shared / "data" / "hdtf" / "WDA_BobMenendez_000.mp4"


@pytest.fixture(scope="module")
def truth(clip: Path) -> Footage:
    video = list(islice(read_frames(clip), FRAMES))
    return track_face("truth", lambda: video, load_backend("mesh"))


def changed(truth: Footage, change: Callable[[np.ndarray, int], np.ndarray]) -> Footage:
    """The same landmarks with other pixels: `change` takes a frame and its index."""
    video = [change(frame, index) for index, frame in enumerate(truth.read())]
    return replace(truth, read=lambda: video)


def test_noise_raises_sharpness(truth: Footage) -> None:
    def noisy(frame: np.ndarray, index: int) -> np.ndarray:
        noise = np.random.default_rng(index).normal(0, 12, frame.shape)
        return (frame + noise).clip(0, 255).astype(np.uint8)

    truth = shortened(truth, 12)
    assert compare(changed(truth, noisy), truth).values["mouth_sharpness"] > 1.5


def test_enlarging_is_not_sharpness(truth: Footage) -> None:
    """Frames generated at half the size are as sharp as real ones of that size, even if enlarged."""
    truth = shortened(truth, 12)
    side = truth.side
    half = resized(truth, side // 2)
    assert eye_distance(half.landmarks).max() == pytest.approx(eye_distance(truth.landmarks).max() / 2)
    enlarged = [cv2.resize(frame, (side, side), interpolation=cv2.INTER_LANCZOS4) for frame in half.read()]
    large = replace(truth, read=lambda: enlarged)
    assert compare(half, truth).values["mouth_sharpness"] == pytest.approx(1, abs=0.2)
    assert compare(large, truth).values["mouth_sharpness"] < 0.5
    assert compare(resized(large, side // 2), truth).values["mouth_sharpness"] == pytest.approx(0.8, abs=0.1)


def test_another_shape_is_another_identity(truth: Footage) -> None:
    few = shortened(truth, 8)
    wider = replace(few, landmarks=few.landmarks * np.float32([1.15, 1]))
    shape = compare(wider, few).values["identity_shape"]
    assert shape > compare(few, few).values["identity_shape"] + 0.02


def test_shares_of_head_motion() -> None:
    ratios = dict(zip(POSE, [0.5, 2, 1, 1, 1, 8], strict=True))
    values = {f"head_range_{name}": 0.1 * ratio for name, ratio in ratios.items()}
    values |= {f"true_head_range_{name}": 0.1 for name in POSE}
    found = head_shares(values)
    assert found["head_range"] == pytest.approx(8 ** (1 / 6))
    assert np.isnan(found["head_speed"])  # without values
    assert head_shares(values | {"head_range_yaw": 0.0})["head_range"] == 0
    assert np.isnan(head_shares(values | {"true_head_range_yaw": 0.0})["head_range"])  # a real head that stands still


def test_motion_is_that_of_the_raw_clip(truth: Footage) -> None:
    few = shortened(truth, 16)
    found = compare(few, few).values
    assert found["head_range"] == found["head_speed"] == pytest.approx(1)
    still = few.landmarks[:1].repeat(16, axis=0)
    assert compare(replace(few, landmarks=still), few).values["head_range"] < 1e-3
    raw = few.landmarks + 2 * (
        few.landmarks.mean(axis=1, keepdims=True) - few.landmarks[:1].mean(axis=1, keepdims=True)
    )
    assert compare(few, few, raw).values["true_head_range_y"] > 1.5 * found["true_head_range_y"]


def test_frames_without_a_face_count_nowhere(truth: Footage) -> None:
    gaps = truth.landmarks.copy()
    gaps[[0, 5, 20]] = np.nan
    found = compare(replace(truth, landmarks=gaps), truth)
    assert found.values["mouth_correlation"] == pytest.approx(1)
    assert found.values["mouth_sharpness"] == pytest.approx(1, abs=0.05)
    assert found.values["ssim"] > 0.95
    assert np.isfinite(found.curves["colour"]).all()
    points, crops = aligned(replace(truth, landmarks=gaps), 30)
    shown = [crop is not None for crop in crops]
    assert shown == np.isfinite(points).all(axis=(1, 2)).tolist() == np.isfinite(gaps).all(axis=(1, 2)).tolist()
    gaps[:12] = np.nan
    with pytest.raises(DheadsError, match="truth: no face in 13 of 32 frames"):
        replace(truth, landmarks=gaps)


def test_a_video_is_decoded_once(monkeypatch: pytest.MonkeyPatch, clip: Path) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(
        "dheads.evaluation.footage.read_frames", lambda path: (opened.append(path), islice(read_frames(path), 4))[1]
    )
    recording = Recording(clip)
    first, second = list(recording()), list(recording())
    assert opened == [clip]
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    monkeypatch.setattr("dheads.evaluation.footage._CACHE_BYTES", 3 * first[0].nbytes)  # too long for the cache
    long = Recording(clip)
    assert [len(list(long())), len(list(long()))] == [4, 4]
    assert opened == [clip] * 3
