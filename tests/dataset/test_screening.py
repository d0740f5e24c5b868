"""Which tracked clips are dropped, and why: synthetic landmarks near the limits, and real clips joined."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest

from dheads.config import AlignmentConfig, PreparationConfig
from dheads.dataset.screening import screen, screen_sync
from dheads.errors import DheadsError
from dheads.faces.alignment import mean_face
from dheads.faces.detection import LandmarkBackend
from dheads.faces.landmarks import load_backend
from dheads.media.reading import read_frames
from dheads.speech.sync import Sync

CONFIG = PreparationConfig()


def still(frames: int = 40, width: float = 100.0) -> np.ndarray:
    """A face that does not move, (F, 68, 2), `width` px from jaw to jaw around (200, 150)."""
    face = mean_face(AlignmentConfig(), 128)
    face = (face - face.mean(axis=0)) * width / np.linalg.norm(face[16] - face[0]) + (200, 150)
    return np.repeat(face[None].astype(np.float32), frames, axis=0)


def without(landmarks: np.ndarray, *frames: int) -> np.ndarray:
    landmarks = landmarks.copy()
    landmarks[list(frames)] = np.nan
    return landmarks


def reason(landmarks: np.ndarray, config: PreparationConfig = CONFIG) -> str:
    with pytest.raises(DheadsError) as error:
        screen(landmarks, config)
    return str(error.value)


# --- Frames without a face


def test_a_clean_clip_is_left_as_it_is() -> None:
    landmarks = still()
    filled = screen(landmarks, CONFIG)
    assert filled.dtype == np.float32
    assert np.array_equal(filled, landmarks)
    assert screen(landmarks[:1], CONFIG).shape == (1, 68, 2)


def test_short_gaps_are_filled_from_their_neighbours() -> None:
    moving = still() + np.arange(40, dtype=np.float32)[:, None, None] * 2
    gaps = without(moving, 10, 11, 12, 13, 14, 39)
    filled = screen(gaps, CONFIG)
    np.testing.assert_allclose(filled[:39], moving[:39], atol=1e-4)
    assert np.array_equal(filled[39], moving[38])  # at an end there is only one neighbour
    assert np.isnan(gaps[10]).all()  # the argument is unchanged


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (range(12), "no face in 12 of 40 frames"),
        (range(10, 16), "no face in 6 of 40 frames"),  # one more than max_gap in a row
        (range(0, 36, 4), "no face in 9 of 40 frames"),  # one more than max_missing of them
        (range(40), "no face in any of 40 frames"),
    ],
)
def test_too_many_frames_without_a_face(missing: range, expected: str) -> None:
    assert reason(without(still(), *missing)) == expected


def test_as_many_frames_without_a_face_as_allowed() -> None:
    assert np.isfinite(screen(without(still(), *range(0, 32, 4)), CONFIG)).all()  # 8 of 40


def test_a_row_that_is_partly_missing_counts_as_missing() -> None:
    landmarks = still()
    landmarks[5:11, 30, 0] = np.nan
    assert reason(landmarks) == "no face in 6 of 40 frames"


def test_no_frames() -> None:
    assert reason(np.empty((0, 68, 2), np.float32)) == "no face in any of 0 frames"


# --- Faces that are small or jump


def test_a_small_face() -> None:
    assert reason(still(width=31)) == "the face is 31 px wide, less than 48"
    screen(still(width=48.1), CONFIG)
    screen(still(width=31), replace(CONFIG, min_face_px=30.5))
    # The median of the clip counts: one bad frame of a good clip does not matter.
    nodding = still(width=50)
    nodding[7] = still(width=46)[0]
    screen(nodding, CONFIG)


def test_a_face_that_jumps() -> None:
    landmarks = still()
    landmarks[25:] += (26, 0)
    assert reason(landmarks) == "the face jumps at frame 25: another face, or a cut"
    landmarks[25:] -= (2, 0)
    screen(landmarks, CONFIG)
    assert "frame 25" in reason(landmarks, replace(CONFIG, max_jump=0.2))


def test_a_face_whose_size_jumps() -> None:
    landmarks = still()
    landmarks[20:] = still(20, width=126)
    assert reason(landmarks) == "the face jumps at frame 20: another face, or a cut"
    landmarks[20:] = still(20, width=124)
    screen(landmarks, CONFIG)


def test_a_face_may_move_further_in_a_gap() -> None:
    landmarks = still()
    landmarks[25:] += (45, 0)
    gap = without(landmarks, 21, 22, 23, 24)  # five frames on: sqrt(5) x 0.25 widths
    screen(gap, CONFIG)
    gap[25:] += (25, 0)
    assert "jumps at frame 25" in reason(gap)


def test_a_face_that_walks_through_the_picture_does_not_jump() -> None:
    steps = np.stack([np.linspace(0, 600, 40), np.linspace(0, 90, 40)], axis=-1)[:, None]
    screen((still() + steps).astype(np.float32), CONFIG)


# --- Real faces


@pytest.fixture(scope="module")
def mesh() -> LandmarkBackend:
    return load_backend("mesh")


def head(shared: Path, name: str, count: int, size: int = 224, first: int = 20) -> Iterator[np.ndarray]:
    for frame in islice(read_frames(shared / "data" / name), first, first + count):
        yield cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA)


def stage(frames: Iterator[np.ndarray], x: int, y: int) -> list[np.ndarray]:
    """Each frame pasted into a wide gray picture."""
    wide = []
    for frame in frames:
        wide.append(np.full((360, 640, 3), 96, np.uint8))
        wide[-1][y : y + len(frame), x : x + len(frame)] = frame
    return wide


# Two of these clips hold a cut to the same person, a fifth of a face away.
@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("talkvid/Language_zh.mp4", 0),
        ("talkvid/Language_en.mp4", 14),
        ("talkvid/Ethnicity_African_3.mp4", 70),
        ("hdtf/RD_Radio2_000.mp4", 40),
        ("grid/other_misc1.mp4", 0),
    ],
)
def test_the_fastest_moves_of_real_people_are_kept(mesh: LandmarkBackend, shared: Path, name: str, first: int) -> None:
    landmarks = mesh.track(islice(read_frames(shared / "data" / name), first, first + 15))
    assert np.array_equal(screen(landmarks, CONFIG), landmarks)


def test_a_clip_that_begins_without_a_face(mesh: LandmarkBackend, shared: Path) -> None:
    landmarks = mesh.track(islice(read_frames(shared / "data" / "grid" / "s1_lgbf8n.mp4"), 30))
    assert reason(landmarks) == "no face in 12 of 30 frames"


@pytest.mark.parametrize(
    ("name", "size"),
    [("talkvid/Gender_male_3.mp4", 224), ("talkvid/Age_31-45_1.mp4", 360), ("hdtf/RD_Radio34_000.mp4", 180)],
)
@pytest.mark.parametrize("x", [40, 90])
def test_a_cut_to_another_person(mesh: LandmarkBackend, shared: Path, name: str, size: int, x: int) -> None:
    before = stage(head(shared, "grid/s1_bbal7s.mp4", 8), 0, 60)
    after = stage(head(shared, name, 12, size), x, 0)
    # Near the last face the tracker follows it, and it jumps; further away the tracker loses the face.
    expected = {"the face jumps at frame 8: another face, or a cut", "no face in 12 of 20 frames"}
    assert reason(mesh.track(before + after)) in expected


def test_a_second_larger_face_while_the_first_vanishes(mesh: LandmarkBackend, shared: Path) -> None:
    alone = stage(head(shared, "talkvid/Gender_male_3.mp4", 12, 200), 0, 60)
    second = stage(head(shared, "talkvid/Age_31-45_1.mp4", 20, 340), 280, 0)
    both = [np.where(a == 96, b, a) for a, b in zip(alone[6:], second[:6], strict=True)]
    landmarks = mesh.track([*alone[:6], *both, *second[6:]])
    # The tracker stays with the first person and then loses him.
    assert np.isfinite(landmarks[:12]).all()
    assert landmarks[:12, :, 0].max() < 200
    assert reason(landmarks) == "no face in 14 of 26 frames"


# --- Lips and sound


def test_clips_in_step_or_nearly_are_kept() -> None:
    for offset in (-0.2, -0.05, 0.0, 0.2):
        screen_sync(Sync(offset, 0.25), CONFIG)


@pytest.mark.parametrize(
    ("sync", "reason"),
    [
        (Sync(0.0, 0.24), "lips and sound do not belong together: their correlation is 0.24 at best"),
        (Sync(-0.26, 0.83), "lips and sound are 0.26 s apart (correlation 0.83)"),
        (Sync(0.21, 0.5), "lips and sound are 0.21 s apart (correlation 0.50)"),
    ],
)
def test_clips_out_of_step_are_dropped(sync: Sync, reason: str) -> None:
    with pytest.raises(DheadsError) as error:
        screen_sync(sync, CONFIG)
    assert str(error.value) == reason
    screen_sync(sync, replace(CONFIG, max_offset_seconds=0.4, min_sync=-1))
