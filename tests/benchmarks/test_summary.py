"""The yardstick's summary, and the measures of benchmarks/photos.py, in closed form."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT, program

from dheads.faces.head_pose import POSE


@pytest.fixture(scope="module")
def photos() -> ModuleType:
    return neighbour("benchmarks/photos.py")


@pytest.fixture(scope="module")
def summary() -> ModuleType:
    return neighbour("benchmarks/summary.py")


def neighbour(path: str) -> ModuleType:
    """A program that imports others of its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / path).parent))
        return program(path)


def row(correlation: float, head: float, true_head: float) -> dict[str, float]:
    values = {"mouth_correlation": correlation, "mouth_range_ratio": 2 * correlation}
    for name in POSE:
        values |= {f"head_range_{name}": head, f"true_head_range_{name}": true_head}
    return values


def test_summary(summary: ModuleType) -> None:
    results = [
        ("ann", {"own": row(0.6, 0.1, 0.1), "control": {"mouth_correlation": 0.1}}),
        ("ann", {"own": row(0.8, 0.3, 0.1)}),
        ("bob", {"own": row(0.4, 0.2, 0.4), "control": {}}),
    ]
    lines = dict(line.removeprefix("| ").split(" | ", 1) for line in summary.summary(results).splitlines()[2:])
    assert lines["mouth: correlation"] == "0.60 | 0.40 (bob) | 0.10 | 0.10 (ann) |"
    assert lines["mouth: range"].startswith("1.20 | 1.40 (ann) | ")  # 1.4 is farther from 1 than 0.8
    assert lines["head: range of yaw"].startswith("1.00 | ")  # the sum over clips: 0.6 of 0.6
    assert lines["head: range, all six"].startswith("1.00 | 2.00 (ann)")  # bob has a half
    assert "mouth: slope" not in lines


def test_how_a_mouth_follows(photos: ModuleType) -> None:
    heard = np.tile([0.0, 0.02, 0.04, 0.06], 25)
    found = photos.mouth_values(0.01 + 0.5 * heard, heard)
    assert found["slope"] == pytest.approx(0.5)
    assert found["follows"] == pytest.approx(1)
    assert found["range"] == pytest.approx(0.5)
    assert found["least"] == pytest.approx(0.01)
    assert found["closes"] == 1
    assert found["is_low"] == pytest.approx(0.25)
    late = photos.mouth_values(np.roll(heard, 2), heard)
    assert late["closes"] == 0


def test_lids_close_as_the_code_asks(photos: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    openness, code = np.full(50, 0.4), np.zeros(50)
    code[10:14] = code[30:33] = -1
    openness[12:15] = 0.1
    openness[31] = 0.2
    openness[45] = 0.0  # nobody asked for it
    monkeypatch.setattr(photos, "eye_openness", lambda frames, landmarks: openness)
    found = photos.lid_values([], np.zeros((50, 68, 2)), code)
    assert found["lids"] == pytest.approx(1 - 0.15 / 0.4)
    assert found["blinks_per_second"] == pytest.approx(0.5)
    assert "lids" not in photos.lid_values([], np.zeros((50, 68, 2)), None)


def test_flicker_is_not_motion(photos: ModuleType) -> None:
    ramp = np.broadcast_to(np.arange(64)[None, None, :, None] * 2, (10, 64, 64, 3))
    steady = ramp + 3 * np.arange(10)[:, None, None, None]
    landmarks = np.full((10, 68, 2), 32.0)
    assert photos.flicker(steady.astype(np.uint8), landmarks) == 0
    blinking = ramp + 10 * (np.arange(10) % 2)[:, None, None, None]
    assert photos.flicker(blinking.astype(np.uint8), landmarks) == pytest.approx(10)
