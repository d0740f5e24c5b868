"""Crops for SyncNet: framed as in the released code, for still, moving, lost and real faces."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from dheads.errors import DheadsError
from dheads.evaluation.syncnet_crops import SIZE, face_crops
from dheads.faces.landmarks import load_backend
from dheads.media.reading import read_frames


def face(centre: tuple[float, float], width: float, height: float) -> np.ndarray:
    """68 landmarks on an ellipse: (68, 2) px."""
    angle = np.arange(68) / 68 * 2 * np.pi
    return np.column_stack([centre[0] + width / 2 * np.cos(angle), centre[1] + height / 2 * np.sin(angle)])


def cropped_by_slices(frame: np.ndarray, x: int, y: int, s: int) -> np.ndarray:
    """The crop around a box as in the released code: a gray border, whole pixels, cv2.resize."""
    margin = int(s * 1.8)
    framed = np.pad(frame, ((margin, margin), (margin, margin), (0, 0)), constant_values=110)
    left, top = x + margin - round(1.4 * s), y + margin - s
    return cv2.resize(framed[top : top + round(2.8 * s), left : left + round(2.8 * s)], (SIZE, SIZE))


@pytest.mark.parametrize("centre", [(150, 140), (20, 200)], ids=["inside", "at the edge"])
def test_crops_are_cut_as_the_released_code_cuts_them(centre: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    frame = cv2.GaussianBlur(rng.integers(0, 256, (240, 320, 3), dtype=np.uint8), (0, 0), 3)
    # 100 px of landmarks and 32 of forehead: a box of 132 px, s = 66, whose centre is 16 px higher.
    crops = np.stack(list(face_crops([frame] * 3, np.stack([face(centre, 90, 100)] * 3))))
    assert crops.shape == (3, SIZE, SIZE, 3)
    assert crops.dtype == np.uint8
    expected = cropped_by_slices(frame, centre[0], centre[1] - 16, 66)[2:-2, 2:-2].astype(int)
    difference = np.abs(crops[0][2:-2, 2:-2] - expected)
    assert difference.mean() < 1  # 185 px are 184.8
    assert np.array_equal(crops[0], crops[2])


def test_a_single_jump_of_the_landmarks_does_not_move_the_crop() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    still = np.stack([face((150, 140), 90, 100)] * 20)
    jumping = still.copy()
    jumping[[0, 9, 10]] += 40
    for crop, expected in zip(face_crops([frame] * 20, jumping), face_crops([frame] * 20, still), strict=True):
        assert np.array_equal(crop, expected)


def test_crops_follow_a_moving_face_and_pass_over_gaps() -> None:
    frame = np.zeros((240, 320, 3), np.uint8)
    landmarks = np.stack([face((100 + 2 * i, 140), 90, 100) for i in range(40)])
    landmarks[[0, 17, 18, 39]] = np.nan
    frames = []
    for i in range(40):
        cv2.circle(picture := frame.copy(), (100 + 2 * i, 124), 6, (255, 255, 255), -1)
        frames.append(picture)
    for crop in list(face_crops(frames, landmarks))[8:-8]:
        white = np.argwhere(crop[..., 0] > 127)
        y, x = white.mean(axis=0)
        assert x == pytest.approx(SIZE / 2, abs=1)
        assert y == pytest.approx(SIZE / 2.8, abs=1)


def test_no_face_in_any_frame_is_refused_at_once() -> None:
    with pytest.raises(DheadsError, match="no frame shows a face"):
        face_crops([], np.full((3, 68, 2), np.nan))


def test_a_real_face_fills_the_crop_as_the_network_expects(shared: Path) -> None:
    """By a detector trained on the same data as that of the released code."""
    clip = shared / "data" / "grid" / "other_lbbc2a.mp4"
    frames = [frame for _, frame in zip(range(13), read_frames(clip), strict=False)]
    crops = list(face_crops(frames, load_backend("mesh").track(iter(frames))))
    path = str(shared / "weights" / "face_detection_yunet_2023mar.onnx")
    found = cv2.FaceDetectorYN.create(path, "", (SIZE, SIZE)).detect(cv2.cvtColor(crops[6], cv2.COLOR_RGB2BGR))[1]
    x, y, width, height = found[0, :4]
    # The box's centre lies in the middle and at 1 / 2.8 of the height, and its larger side is 2 / 2.8 of the crop.
    assert x + width / 2 == pytest.approx(SIZE / 2, abs=10)
    assert y + height / 2 == pytest.approx(SIZE / 2.8, abs=12)
    assert max(width, height) == pytest.approx(SIZE * 2 / 2.8, rel=0.1)
