"""Measures of constructed signals, pictures and landmarks, in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from dheads.config import AlignmentConfig
from dheads.evaluation.measures import (
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
    slope,
    spread,
    ssim,
)
from dheads.faces.alignment import MOUTH, eye_distance, mean_face

RNG = np.random.default_rng(0)
FACE = mean_face(AlignmentConfig(), 128)


def test_slope() -> None:
    heard = RNG.standard_normal(50)
    assert slope(0.4 * heard + 2, heard) == pytest.approx(0.4)
    assert slope(np.array([0.0, 1, 0, 1]), np.array([0.0, 0, 1, 1])) == pytest.approx(0)
    lost = 0.4 * heard
    lost[7] = np.nan
    assert slope(lost, heard[:40]) == pytest.approx(0.4)  # over the common frames
    assert slope(np.zeros(50), heard) == 0
    assert np.isnan(slope(heard, np.full(50, 0.3)))  # nothing is heard


def test_spread() -> None:
    assert spread(np.r_[np.arange(101.0), np.nan]) == pytest.approx(90)


def test_sharpness() -> None:
    y, x = np.mgrid[:128, :128]
    board = np.where((x + y) % 2, 200, 100).astype(np.uint8)
    crop = np.repeat(board[..., None], 3, axis=-1)
    # Each pixel differs by 100 from its four neighbours: +-400.
    assert sharpness(crop, FACE) == pytest.approx(400**2, rel=1e-3)
    assert sharpness(np.full_like(crop, 77), FACE) == 0
    elsewhere = np.full_like(crop, 77)
    elsewhere[:50] = crop[:50]  # the eyes
    assert sharpness(elsewhere, FACE) == 0


def test_shapes_do_not_depend_on_position_size_and_angle() -> None:
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


def test_colour_of_the_face() -> None:
    crop = np.full((128, 128, 3), (112, 100, 97), np.uint8)
    crop[:20] = 255  # above the face
    np.testing.assert_allclose(face_colour(crop, FACE), (112, 100, 97))


def test_colour_drift() -> None:
    colours = np.full((75, 3), 100.0)
    assert colour_drift(colours) == 0
    colours[50:] += (12, 0, 3)
    assert colour_drift(colours) == pytest.approx(5)
    assert colour_drift(colours[:50]) == 0


# ---- Curves ----


def test_by_second() -> None:
    values = np.r_[np.zeros(25), np.full(25, np.nan), np.arange(10.0)]
    values[3] = np.nan
    assert by_second(values) == pytest.approx([0, np.nan, 4.5], nan_ok=True)
    assert by_second(np.empty(0)) == []


def test_colour_change_is_from_the_first_second() -> None:
    colours = np.full((60, 3), 100.0)
    colours[40] = (112, 100, 97)
    colours[0] = np.nan
    change = colour_change(colours)
    assert change[40] == pytest.approx(5)
    assert np.isnan(change[0])
    assert not np.delete(change, [0, 40]).any()


# ---- Pictures ----


def test_ssim_of_flat_frames() -> None:
    """Without variance, SSIM = (2 a b + C1) / (a^2 + b^2 + C1), C1 = (0.01 * 255)^2."""
    a, b = np.full((16, 16, 3), 100, np.uint8), np.full((16, 16, 3), 150, np.uint8)
    assert ssim(a, b) == pytest.approx((2 * 100 * 150 + 2.55**2) / (100**2 + 150**2 + 2.55**2))
    assert ssim(a, a) == 1


def test_ssim_of_a_frame_and_its_negative() -> None:
    """With equal means, variance v and covariance -v, SSIM is (C2 - 2 v) / (C2 + 2 v), close to -1."""
    y, x = np.mgrid[:64, :64]
    board = np.where((x + y) % 2, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=-1)
    assert ssim(board, 255 - board) == pytest.approx(-1, abs=0.01)


def test_psnr() -> None:
    a = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(a, a + np.uint8(5)) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr(a, a - np.uint8(5)) == psnr(a, a + np.uint8(5))  # nothing wraps
    assert psnr(np.zeros_like(a), np.full_like(a, 255)) == 0


def test_psnr_of_equal_frames_is_finite() -> None:
    a = RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    assert psnr(a, a) == 100


# ---- Landmark distance ----


def test_lmd() -> None:
    still = np.repeat(FACE[None], 4, axis=0)
    moved = still.copy()
    moved[1, 51] += (0, 10)  # one of 20 points: 9.5 px from the new centre, and the others 0.5 px
    assert lmd(still, still, 128) == 0
    assert lmd(moved, still, 128) == pytest.approx((9.5 + 19 * 0.5) / 20 / 4)


def test_lmd_does_not_see_where_the_mouth_is() -> None:
    still = np.repeat(FACE[None], 4, axis=0)
    moved = still.copy()
    moved[:, MOUTH] += (7, -3)
    moved[:, :48] *= 2
    assert lmd(moved, still, 128) == pytest.approx(0, abs=1e-5)


def test_lmd_is_in_pixels_at_128() -> None:
    still = np.repeat(FACE[None], 4, axis=0)
    moved = still + RNG.standard_normal(still.shape)
    assert lmd(2 * moved, 2 * still, 256) == pytest.approx(lmd(moved, still, 128))


def test_lmd_leaves_out_frames_without_a_face() -> None:
    still = np.repeat(FACE[None], 4, axis=0)
    moved = still + RNG.standard_normal(still.shape)
    lost = moved.copy()
    lost[2] = np.nan
    keep = [0, 1, 3]
    assert lmd(lost, still, 128) == pytest.approx(lmd(moved[keep], still[keep], 128))
    assert np.isnan(lmd(np.full_like(still, np.nan), still, 128))


# ---- Head motion ----


def moving_face(scale: np.ndarray, roll: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Landmarks (F, 68, 2) of a face that is scaled and rolled about (63.5, 63.5), and shifted to the right, px."""
    factor = scale * np.exp(1j * roll)
    points = factor[:, None] * (FACE @ (1, 1j) - 63.5 * (1 + 1j)) + shift[:, None] + 63.5 * (1 + 1j)
    return np.stack([points.real, points.imag], axis=-1)


def test_range_and_speed_of_a_head() -> None:
    time = np.arange(200)
    slowly = np.sin(2 * np.pi * time / 100)  # smoothing over 1.5 frames leaves it as it is
    landmarks = moving_face(np.exp(0.05 * slowly), 0.1 * np.cos(2 * np.pi * time / 100), 6.4 * slowly)
    poses = clip_poses(landmarks)
    found = pose_range(poses)
    assert found[:3] == pytest.approx(np.array([0.05, 0.1, 0.1]) / np.sqrt(2), rel=0.02)  # 6.4 px are 0.1 half crops
    assert found[3:] == pytest.approx(0, abs=1e-3)
    # The derivative of a sin(w k) has the root mean square a w / sqrt(2).
    steps = np.array([0.05, 0.1, 0.1]) * 2 * np.pi / 100 / np.sqrt(2)
    assert pose_speed(poses)[:3] == pytest.approx(steps, rel=0.03)
    larger = clip_poses(3 * landmarks + 40)  # the same clip in a larger picture
    assert larger == pytest.approx(poses, abs=1e-5)


def test_a_head_turns_aside() -> None:
    landmarks = np.repeat(FACE[None].astype(np.float64), 60, axis=0)
    landmarks[30:, 30] += 3, -2  # the tip of the nose
    found = pose_range(clip_poses(landmarks))
    eyes = eye_distance(FACE)
    assert found[4:] == pytest.approx(np.array([1.5, 1.0]) / eyes, rel=0.05)  # half of the step


def test_motion_of_lost_and_of_single_frames() -> None:
    landmarks = moving_face(np.ones(40), np.zeros(40), np.linspace(0, 4, 40))
    landmarks[10] = np.nan
    assert np.isfinite(pose_range(clip_poses(landmarks))).all()
    assert np.isfinite(pose_speed(clip_poses(landmarks))).all()
    assert np.isnan(pose_speed(clip_poses(landmarks[:1]))).all()
