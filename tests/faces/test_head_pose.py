"""The pose of a head by its landmarks."""

from __future__ import annotations

import numpy as np
import pytest

from dheads.config import AlignmentConfig
from dheads.faces.alignment import mean_face
from dheads.faces.head_pose import head_pose

ALIGNMENT = AlignmentConfig(eye_distance=0.3, eye_y=0.38)
SIZE = 128


def moved(factor: float, angle: float, x: float, y: float) -> np.ndarray:
    """The mean face after a similarity in coordinates from -1 to 1, five frames (5, 68, 2) px."""
    points = (2 * mean_face(ALIGNMENT, SIZE).astype(np.float64) + 1) / SIZE - 1
    z = factor * np.exp(1j * angle) * (points @ (1, 1j)) + x + 1j * y
    px = ((np.stack([z.real, z.imag], -1) + 1) * SIZE - 1) / 2
    return np.repeat(px[None], 5, axis=0)


def test_the_mean_face_has_no_pose() -> None:
    pose = head_pose(moved(1, 0, 0, 0), ALIGNMENT, SIZE)
    assert pose.shape == (5, 6)
    assert pose.dtype == np.float32
    np.testing.assert_allclose(pose, 0, atol=1e-6)


@pytest.mark.parametrize("similarity", [(1.1, 0.1, 0.05, -0.02), (0.8, -0.3, -0.2, 0.1)])
def test_a_moved_face_has_the_similarity_that_moved_it(similarity: tuple[float, float, float, float]) -> None:
    factor, angle, x, y = similarity
    expected = np.broadcast_to([np.log(factor), angle, x, y, 0, 0], (5, 6))
    np.testing.assert_allclose(head_pose(moved(*similarity), ALIGNMENT, SIZE), expected, atol=1e-6)


def test_yaw_and_pitch_are_where_the_tip_of_the_nose_is() -> None:
    """A tip that is a tenth of an eye distance aside, in a face that is turned and enlarged."""
    points = moved(1.2, 0.2, 0, 0)
    d = 1.2 * ALIGNMENT.eye_distance * SIZE
    aside, down = np.array([np.cos(0.2), np.sin(0.2)]), np.array([-np.sin(0.2), np.cos(0.2)])
    straight = head_pose(points, ALIGNMENT, SIZE)
    points[:, 30] += 0.1 * d * aside - 0.05 * d * down
    pose = head_pose(points, ALIGNMENT, SIZE)
    # The nose's tip has its part in the similarity, which moves a little.
    np.testing.assert_allclose(pose[:, 4:] - straight[:, 4:], [[0.1, -0.05]] * 5, atol=0.01)


def test_trembling_landmarks_are_smoothed() -> None:
    rng = np.random.default_rng(0)
    still = np.repeat(moved(1, 0, 0, 0)[:1], 200, axis=0)
    pose = head_pose(still + rng.normal(0, 0.5, still.shape), ALIGNMENT, SIZE)
    assert pose[:, :4].std(axis=0).max() < 0.002
    assert np.abs(np.diff(pose, axis=0)).mean() < 0.002, "half a pixel of noise is 0.03 in yaw"
