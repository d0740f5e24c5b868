"""Blinks: on constructed signals, and on real clips in which they were marked by eye."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest

from dheads.evaluation.measures import blink_seconds, blinks, blinks_per_second
from dheads.faces import alignment as faces
from dheads.faces.eyelids import eye_openness
from dheads.faces.landmarks import load_backend
from dheads.media.reading import read_frames
from dheads.system.files import file_sha256
from dheads.weights.listing import ASSETS, known

# First and last frame in which the lids are shut or nearly so, in the first three seconds. Found by looking at every
# frame, before any measuring.
MARKED = {
    "hdtf/RD_Radio2_000": [(44, 46), (53, 56)],
    "hdtf/RD_Radio34_000": [],
    "hdtf/WDA_AlexandriaOcasioCortez_000": [(9, 12), (25, 27), (33, 36), (56, 58)],
    "talkvid/Gender_female_1": [(19, 20), (40, 46), (54, 55)],
    "talkvid/Gender_male_1": [(19, 20), (25, 26), (41, 42), (67, 69)],
    "talkvid/Gender_male_3": [],
    "talkvid/Language_hi": [(3, 6), (30, 48), (70, 74)],
}


# ---- Signals ----


def signal() -> np.ndarray:
    """4 s with blinks of 3, 2 and 3 frames, one frame that is none, and one without a face."""
    openness = np.full(100, 0.3)
    openness[10:13] = openness[50:52] = openness[97:] = 0.1
    openness[70] = 0.1
    openness[80] = np.nan
    return openness


def test_blinks_are_found_with_their_first_and_last_frame() -> None:
    assert blinks(signal()) == [(10, 12), (50, 51), (97, 99)]


def test_blinks_per_second() -> None:
    assert blinks_per_second(signal()) == pytest.approx(3 / 4)


def test_blink_seconds() -> None:
    assert blink_seconds(signal()) == pytest.approx((3 + 2 + 3) / 3 / 25)


def test_the_threshold_is_the_clips_own() -> None:
    assert blinks(signal() * 0.4) == blinks(signal())
    assert blinks_per_second(np.full(50, 0.1)) == 0  # narrow eyes are not shut
    assert blinks_per_second(np.r_[np.full(40, 0.3), np.full(10, 0.24)]) == 0  # nor are eyes that look down


def test_a_frame_without_a_face_ends_a_blink() -> None:
    openness = np.full(100, 0.3)
    openness[10:15] = 0.1, 0.1, np.nan, 0.1, 0.1
    assert blinks(openness) == [(10, 11), (13, 14)]


def test_without_blinks_they_have_no_length() -> None:
    assert np.isnan(blink_seconds(np.full(50, 0.3)))


@pytest.mark.filterwarnings("error")
def test_without_a_face_there_is_no_value() -> None:
    for openness in (np.full(50, np.nan), np.empty(0)):
        assert np.isnan(blinks_per_second(openness))
        assert np.isnan(blink_seconds(openness))


# ---- Eyes ----


def test_the_packaged_network_is_the_listed_one() -> None:
    entry = known()["mediapipe-iris"]
    packaged = ASSETS / entry["file"]
    assert (packaged.stat().st_size, file_sha256(packaged)) == (entry["bytes"], entry["sha256"])


@pytest.fixture(scope="module")
def still(shared: Path) -> tuple[np.ndarray, np.ndarray]:
    """A frame with open eyes, and its landmarks."""
    frame = next(read_frames(shared / "data" / "talkvid" / "Language_en.mp4"))
    return frame, load_backend("mesh").track([frame])


def test_openness_does_not_depend_on_size_side_and_tilt(still: tuple[np.ndarray, np.ndarray]) -> None:
    frame, landmarks = still
    (true,) = eye_openness([frame], landmarks)
    height, width = frame.shape[:2]
    mirror = np.array([[-1.0, 0, width - 1], [0, 1, 0]])
    larger = np.array([[1.5, 0, 0], [0, 1.5, 0]])
    tilted = cv2.getRotationMatrix2D((width / 2, height / 2), 20, 1)
    for matrix, size, swap in ((mirror, width, True), (larger, round(1.5 * width), False), (tilted, width, False)):
        points = faces.apply_transform(matrix, landmarks)
        if swap:  # the person's right eye is the left one now: its corners from left to right
            points[:, [36, 39, 42, 45]] = points[:, [45, 42, 39, 36]]
        assert eye_openness([faces.warp(frame, matrix, size)], points) == pytest.approx([true], rel=0.1)


def test_no_face_and_no_eyes_have_no_openness(still: tuple[np.ndarray, np.ndarray]) -> None:
    frame, landmarks = still
    lost, point = np.full_like(landmarks, np.nan), np.zeros_like(landmarks)
    values = eye_openness([frame] * 3, np.concatenate([lost, landmarks, point]))
    np.testing.assert_array_equal(np.isfinite(values), [False, True, False])


# ---- Real clips ----


def test_marked_blinks_are_found_and_no_others(shared: Path) -> None:
    backend = load_backend("mesh")
    found = {}
    for clip in MARKED:
        frames = list(islice(read_frames(shared / "data" / f"{clip}.mp4"), 75))
        landmarks = backend.track(frames)
        found[clip] = blinks(eye_openness(frames, landmarks))
    precision, recall = scores(found)
    assert precision >= 0.9
    assert recall >= 0.85
    assert found["hdtf/RD_Radio34_000"] == found["talkvid/Gender_male_3"] == []


def scores(found: dict[str, list[tuple[int, int]]]) -> tuple[float, float]:
    """Precision and recall of blinks: one is hit if the two share a frame."""
    pairs = [(clip, blink) for clip in found for blink in found[clip]]
    marks = [(clip, blink) for clip in MARKED for blink in MARKED[clip]]
    precision = np.mean([any(share(blink, mark) for mark in MARKED[clip]) for clip, blink in pairs])
    recall = np.mean([any(share(blink, mark) for blink in found[clip]) for clip, mark in marks])
    return float(precision), float(recall)


def share(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]
