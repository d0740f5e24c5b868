"""The measure of lips and sound without a downloaded network, on a real clip."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from real_data import write_wav

from dheads.evaluation.footage import Footage, shortened
from dheads.evaluation.instruments import LipMeter
from dheads.evaluation.pairs import FootagePair, VideoPair
from dheads.faces.landmarks import load_backend
from dheads.media.reading import read_frames
from dheads.media.sound import delayed, load_waveform

NAMES = {"sync_offset_ms", "sync_correlation", "true_sync_offset_ms", "true_sync_correlation"}


def test_late_sound_is_measured(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "grid" / "s1_bbas3a.mp4"
    landmarks = load_backend("mesh").track(islice(read_frames(source), 75))
    footage = Footage("clip", lambda: read_frames(source), landmarks, 40.0, 224)
    sound = load_waveform(source)
    write_wav(tmp_path / "real.wav", sound)
    write_wav(tmp_path / "late.wav", delayed(sound, 0.2))
    files = VideoPair("clip", tmp_path / "late.wav", tmp_path / "real.wav")
    meter = LipMeter("cpu")
    values = meter.measure(FootagePair(files, footage, footage))
    assert set(values) == NAMES
    assert abs(values["true_sync_offset_ms"]) < 30
    assert values["sync_offset_ms"] == pytest.approx(values["true_sync_offset_ms"] - 200, abs=10)
    assert values["sync_correlation"] == pytest.approx(values["true_sync_correlation"], abs=0.03)
    assert values["true_sync_correlation"] > 0.8
    assert meter.measure(FootagePair(files, shortened(footage, 60), shortened(footage, 60))) == {}
