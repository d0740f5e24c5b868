"""Measures of constructed signals, pictures and landmarks, in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from dheads.config import AlignmentConfig
from dheads.evaluation.measures import (
    by_second,
    colour_change,
    colour_drift,
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
from dheads.faces.alignment import MOUTH, eye_distance, mean_face

RNG = np.random.default_rng(0)
FACE = mean_face(AlignmentConfig(), 128)


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
