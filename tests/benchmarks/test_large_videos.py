"""The measures of benchmarks/large_videos.py in closed form."""

from __future__ import annotations

from types import ModuleType

import cv2
import numpy as np
import pytest
from test_summary import neighbour

from dheads.config import preset
from dheads.faces.alignment import mean_face

SIDE = 256


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return neighbour("benchmarks/large_videos.py")


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    return np.stack([mean_face(preset("small").alignment, SIDE)] * 4)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8))


def test_blur_lowers_sharpness_where_it_is(program: ModuleType, frames: list[np.ndarray], points: np.ndarray) -> None:
    seen = np.ones(4, bool)
    soft = [frame.copy() for frame in frames]
    for frame in soft:
        frame[160:] = cv2.GaussianBlur(frame, (0, 0), 2)[160:]  # mouth and chin
    assert program.mouth(soft, points, seen) < 0.1 * program.mouth(frames, points, seen)
    assert program.outside(soft, points, seen) == pytest.approx(program.outside(frames, points, seen), rel=0.3)


def test_only_pixels_that_keep_their_place_flicker(program: ModuleType, points: np.ndarray) -> None:
    """The left half of the picture stands still and brightens by 4 a frame; the right half moves."""
    frames = [np.full((SIDE, SIDE, 3), 100, np.uint8) for _ in range(4)]
    layers = [np.zeros((SIDE, SIDE, 7), np.float32) for _ in range(4)]
    for k in range(4):
        frames[k][:, :128] += np.uint8(4 * k)
        frames[k][:, 128:] += np.uint8(30 * k)
        layers[k][:, 128:, 5] = 0.1 * k
    assert program.steady_change(frames, layers, points) == pytest.approx(4, abs=0.1)


def test_a_mouth_that_goes_on_evenly_does_not_tremble(program: ModuleType, points: np.ndarray) -> None:
    even = [np.full((SIDE, SIDE, 3), 100 + 10 * k, np.uint8) for k in range(4)]
    assert program.trembling(even, points) == 0
    even[1] += np.uint8(5)
    assert program.trembling(even, points) == pytest.approx((5 + 2.5) / 2)


def test_layers_of_the_photo_alone(program: ModuleType) -> None:
    layers = np.ones((8, 8, 7), np.float32)
    alone = program.photo_alone(layers)
    assert (alone[..., :5] == 0).all()
    assert (alone[..., 5:] == 1).all()
    assert (layers == 1).all()
