"""A real clip whose sound is late: the offset is measured, the sound is shifted, and the tables say so."""

from __future__ import annotations

import copy
import csv
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from real_data import in_this_process, write_wav

from dheads.config import override, preset
from dheads.dataset.clip_worker import Finished, finished
from dheads.dataset.extraction import Detector, Extract
from dheads.dataset.prepare import prepare
from dheads.dataset.sources import Source
from dheads.media.sound import delayed, load_waveform

pytest_plugins = "real_data"

CLIP = "s1/s1_late"
LATE = 0.16  # s


@pytest.fixture(scope="module")
def raw(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GRID's video, and its sound as it is and late."""
    folder = tmp_path_factory.mktemp("raw")
    source = shared / "data" / "grid" / "s1_bbal7s.mp4"
    (folder / "s1").mkdir()
    shutil.copyfile(source, folder / "s1" / "late.mp4")
    sound = delayed(load_waveform(source), -1024 / 44_100)  # it is late by a frame of AAC
    write_wav(folder / "plain.wav", sound)
    write_wav(folder / "late.wav", delayed(sound, LATE))
    return folder


@pytest.fixture(scope="module")
def detector(detector: Detector) -> Iterator[Detector]:
    """One that encodes no sound twice, nor at other tempos."""
    one_tempo = copy.copy(detector)
    one_tempo.config = override(detector.config, {"preparation": {"speech_tempos": []}})
    encode, encoded = detector.encoder.encode, {}

    def remembering(waveform: torch.Tensor, frames: int) -> torch.Tensor:
        key = waveform.numpy().tobytes(), frames
        if key not in encoded:
            encoded[key] = encode(waveform, frames)
        return encoded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector.encoder, "encode", remembering)
        yield one_tempo


@pytest.fixture(scope="module")
def late(detector: Detector, raw: Path) -> Extract:
    return detector(raw, Source("s1/late.mp4", CLIP, "s1", "train", sound="late.wav"))


def test_late_sound_is_measured_and_shifted(detector: Detector, raw: Path, late: Extract) -> None:
    landmarks, sound = late.labels["landmarks"].numpy(), load_waveform(raw / "plain.wav")
    waveform, speech, sync = detector.in_step(sound, landmarks)
    assert sync is not None
    assert abs(sync.offset_seconds) < 0.04
    assert torch.equal(waveform, sound[: len(waveform)])
    assert torch.equal(speech, detector.encoder.encode(waveform, len(landmarks)))

    assert late.sync is not None
    assert late.sync.offset_seconds == pytest.approx(sync.offset_seconds - LATE, abs=0.01)
    assert min(late.sync.correlation, sync.correlation) > 0.8
    shifted = delayed(load_waveform(raw / "late.wav"), late.sync.offset_seconds)
    assert torch.equal(late.waveform, shifted[: len(late.waveform)])
    assert torch.equal(late.labels["speech"], detector.encoder.encode(late.waveform, len(late)).half())


def test_other_encoders_measure_nothing(
    raw: Path, detector: Detector, late: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = detector.config
    other = replace(config, conditioning=replace(config.conditioning, speech_encoder="another"))
    monkeypatch.setattr("dheads.dataset.extraction.load_speech_encoder", lambda *_: detector.encoder)
    sound = load_waveform(raw / "late.wav")
    waveform, _, sync = Detector(other, "cpu").in_step(sound, late.labels["landmarks"].numpy())
    assert sync is None
    assert torch.equal(waveform, sound[: len(waveform)])


def test_the_offset_is_listed_and_survives_a_second_run(
    raw: Path, late: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = in_this_process(monkeypatch, lambda raw, source: replace(late, frames=iter(late.frames)))
    for _ in range(2):
        summary = prepare(raw, tmp_path, preset("tiny"), progress=False)
        assert summary.failed == []
        with (tmp_path / "clips.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        assert float(row["offset_ms"]) == pytest.approx(1000 * late.sync.offset_seconds, abs=0.051)
        assert float(row["sync"]) == pytest.approx(late.sync.correlation, abs=0.00051)
    assert tried == ["s1/late.mp4"]
    assert finished(tmp_path, CLIP) == Finished(len(late), late.sync)
