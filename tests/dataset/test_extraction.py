"""One raw clip to an aligned clip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from real_data import cut

from dheads.dataset import extraction
from dheads.dataset.extraction import Detector
from dheads.dataset.sources import Source
from dheads.media.reading import read_frames

pytest_plugins = "real_data"


def test_a_video_is_decoded_once_where_it_can_be_kept(
    shared: Path, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not all of it can be kept, or none, it is decoded again, and the clip is the same."""
    cut(shared / "data" / "grid" / "s1_bbal7s.mp4", tmp_path / "a.mp4", 8)
    decoded: list[Path] = []

    def noted(path: Path) -> Iterator[np.ndarray]:
        decoded.append(path)
        return read_frames(path)

    monkeypatch.setattr(extraction, "read_frames", noted)
    made, pictures = [], []
    for kept_bytes, times in ((2**30, 1), (3 * 224 * 224 * 3, 2), (0, 2)):
        decoded.clear()
        monkeypatch.setattr(extraction, "_KEPT_BYTES", kept_bytes)
        made.append(detector(tmp_path, Source("a.mp4", "a/b", "a", "train")))
        pictures.append([np.stack(values) for values in zip(*made[-1].frames, strict=True)])
        assert decoded == [tmp_path / "a.mp4"] * times
    for other, (frames, eyes) in zip(made, pictures, strict=True):
        assert np.array_equal(frames, pictures[0][0])
        assert np.array_equal(eyes, pictures[0][1])
        assert all(torch.equal(other.labels[key], made[0].labels[key]) for key in made[0].labels)
