"""OFM and F-MSE of constructed videos in closed form, as in the released script and as intended."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest

from dheads.evaluation.flow import Smoothness, smoothness
from dheads.media.reading import read_frames

FLAT = np.full((128, 128, 3), 100, np.uint8)
JET_0 = 128 / 3  # mean of (128, 0, 0), the colour of zero


def texture(seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 60, (160, 160))
    return np.clip(128 + 3 * cv2.GaussianBlur(noise, (0, 0), 2), 0, 255).astype(np.uint8)[..., None].repeat(3, axis=-1)


def test_a_still_flat_video() -> None:
    assert smoothness([FLAT] * 5) == {"ofm_paper": pytest.approx(JET_0), "fmse_paper": 0, "ofm": 0, "fmse": 0}


def test_a_still_video_is_not_zero_as_published() -> None:
    """Farneback leaves a hundredth of a pixel at the edges, which the stretch to 0..255 makes visible."""
    values = smoothness([texture()[:128, :128]] * 5)
    assert values["ofm_paper"] == pytest.approx(44.0, abs=1.5)
    assert values["ofm"] < 0.02
    assert values["fmse_paper"] == values["fmse"] == 0


@pytest.mark.parametrize(("step", "published", "true"), [(15, 225, 225), (16, 0, 256), (-16, 0, 256), (20, 144, 400)])
def test_differences_wrap_as_published_and_do_not_in_truth(step: int, published: int, true: int) -> None:
    values = smoothness([FLAT, (FLAT.astype(int) + step).astype(np.uint8)])
    assert (values["fmse_paper"], values["fmse"]) == (published, true)


def test_flow_is_in_pixels_at_128() -> None:
    """A shift of 2 px at 128 px scores 2, also in a video twice as large."""
    picture = texture()
    small = [picture[10 : 10 + 128, k : k + 128] for k in range(0, 8, 2)]
    assert smoothness(small)["ofm"] == pytest.approx(2, abs=0.15)
    large = [cv2.resize(frame, (256, 256), interpolation=cv2.INTER_CUBIC) for frame in small]
    assert smoothness(large)["ofm"] == pytest.approx(2, abs=0.15)


def test_the_published_flow_does_not_see_speed() -> None:
    """As it is stretched, a moving corner scores the same at twice the speed."""
    picture = texture()
    values = {}
    for speed in (1, 2):
        frames = [picture[:128, :128].copy() for _ in range(2)]
        frames[1][40:80, 40:80] = picture[40:80, 40 - speed : 80 - speed]
        values[speed] = smoothness(frames)
    assert values[2]["ofm"] > 1.5 * values[1]["ofm"]
    assert values[2]["ofm_paper"] == pytest.approx(values[1]["ofm_paper"], rel=0.1)


def test_the_colours_are_those_of_the_released_script() -> None:
    """Channels are in the order B, G, R when they are converted to gray."""
    red, blue = np.zeros((2, 128, 128, 3), np.uint8)
    red[..., 0] = texture()[:128, :128, 0]
    blue[..., 2] = red[..., 0]
    moved = [smoothness([picture, np.roll(picture, 3, axis=1)])["fmse"] for picture in (red, blue)]
    assert moved[0] == moved[1]  # squares do not depend on the order
    weak = np.array([[[0, 0, 2]]], np.uint8).repeat(128, axis=0).repeat(128, axis=1)
    assert smoothness([weak * 0, weak])["fmse"] == pytest.approx(4 / 3)


def test_means_are_over_pairs_of_frames() -> None:
    frames = [FLAT, FLAT + np.uint8(2), FLAT + np.uint8(2)]
    assert smoothness(frames)["fmse"] == pytest.approx((4 + 0) / 2)


def test_fewer_than_two_frames_have_no_value() -> None:
    assert smoothness([]) == smoothness([FLAT]) == {}


def test_frames_are_taken_one_at_a_time() -> None:
    """Only the last frame is kept, as a copy: the memory of the frames can be reused."""
    buffer = np.empty_like(FLAT)

    def reused() -> Iterator[np.ndarray]:
        for level in (10, 13, 17, 17):
            buffer[:] = level
            yield buffer

    assert smoothness(reused())["fmse"] == pytest.approx((9 + 16 + 0) / 3)


def test_a_real_clip(shared: Path) -> None:
    """In the range of the paper: real clips have OFM 68.76 and F-MSE 7.76 in CREMA, 72.02 and 27.34 in LRW."""
    meter = Smoothness()
    for frame in islice(read_frames(shared / "data" / "grid" / "other_lbbc2a.mp4"), 25):
        meter.add(frame)
    values = meter.values()
    assert 43 < values["ofm_paper"] < 75
    assert 0 < values["fmse_paper"] < values["fmse"] < 30
    assert 0.02 < values["ofm"] < 1
