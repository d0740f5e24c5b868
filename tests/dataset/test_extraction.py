"""One raw clip to an aligned clip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from real_data import CUTS, Prepared

from dheads.dataset import extraction
from dheads.dataset.extraction import Detector
from dheads.dataset.sources import Source
from dheads.media.reading import read_frames

pytest_plugins = "real_data"


@pytest.mark.parametrize(("kept_bytes", "times"), [(2**30, 1), (3 * 224 * 224 * 3, 2)])
def test_a_video_is_decoded_once_where_it_can_be_kept(
    prepared: Prepared, detector: Detector, monkeypatch: pytest.MonkeyPatch, kept_bytes: int, times: int
) -> None:
    """Where it cannot be kept it is decoded again, and the clip is the same."""
    name = next(name for name in CUTS if "grid" in name)
    decoded: list[Path] = []

    def noted(path: Path) -> Iterator[np.ndarray]:
        decoded.append(path)
        return read_frames(path)

    monkeypatch.setattr(extraction, "read_frames", noted)
    monkeypatch.setattr(extraction, "_KEPT_BYTES", kept_bytes)
    made = detector(prepared.raw, Source(name, "a/b", "a", "train"))
    frames, eyes = map(np.stack, zip(*made.frames, strict=True))
    assert decoded == [prepared.raw / name] * times
    monkeypatch.setattr(extraction, "_KEPT_BYTES", 0)
    again = detector(prepared.raw, Source(name, "a/b", "a", "train"))
    frames_again, eyes_again = map(np.stack, zip(*again.frames, strict=True))
    assert np.array_equal(frames_again, frames)
    assert np.array_equal(eyes_again, eyes)
    assert all(torch.equal(made.labels[key], again.labels[key]) for key in made.labels)
