"""One small prepared dataset of real clips, made through the command line once a test run; and helpers for media.

A plugin: a test module that wants its fixtures says `pytest_plugins = "real_data"`. PYTEST_DONT_REWRITE: it asserts
nothing, and the modules import its helpers before pytest could rewrite it.
"""

from __future__ import annotations

import csv
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from dheads import cli
from dheads.config import SAMPLE_RATE, preset
from dheads.dataset import clip_worker, prepare
from dheads.dataset.clip_worker import Finished
from dheads.dataset.extraction import Detector
from dheads.dataset.sources import Source
from dheads.extensions import lips
from dheads.media.sound import load_waveform
from dheads.media.writing import write_video
from dheads.training import records

# A clip of ours: the real one it is cut from, its number of frames, speaker and split. The third has 24 fps.
CUTS = {
    "grid/one.mp4": ("grid/s1_bbal7s.mp4", 25, "s1", "train"),
    "grid/two.mp4": ("grid/s1_bbas3a.mp4", 25, "s1", "train"),
    "talkvid/en.mp4": ("talkvid/Language_en.mp4", 30, "en", "train"),
    "grid/other.mp4": ("grid/other_lbbc2a.mp4", 20, "other", "val"),
}
WHOLE = {
    "grid/dirty.mp4": ("grid/s1_lgbf8n.mp4", "s1", "train"),  # no face in its first frames
    "stills/a.jpg": ("stills/001.jpg", "still_a", "train"),
    "stills/b.jpg": ("stills/002.jpg", "still_b", "train"),
}
UNLISTED = "stills/unlisted.jpg"  # below the raw folder, but not in the CSV of splits


@dataclass(frozen=True)
class Prepared:
    raw: Path
    splits: Path
    data: Path
    done: Result  # of the command


def dheads(*args: object) -> Result:
    """The command line, in this process."""
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def prepare_command(raw: Path, splits: Path, data: Path) -> Result:
    return dheads("prepare", raw, "--out", data, "--preset", "tiny", "--splits", splits, "--workers", 1)


@pytest.fixture(scope="session")
def prepared(shared: Path, tmp_path_factory: pytest.TempPathFactory, detector: Detector) -> Prepared:
    root = tmp_path_factory.mktemp("prepared")
    raw, splits = root / "raw", root / "splits.csv"
    rows = [("clip", "speaker", "split")]
    for name, (source, frames, speaker, split) in CUTS.items():
        cut(shared / "data" / source, raw / name, frames)
        rows.append((name, speaker, split))
    for name, (source, speaker, split) in WHOLE.items():
        copy(shared / "data" / source, raw / name)
        rows.append((name, speaker, split))
    copy(shared / "data" / "stills" / "003.jpg", raw / UNLISTED)
    with splits.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch, detector)
        return Prepared(raw, splits, root / "data", prepare_command(raw, splits, root / "data"))


@pytest.fixture(scope="session")
def detector() -> Detector:
    """The networks that prepare with the tiny preset, loaded once."""
    return Detector(preset("tiny"), "cpu")


@pytest.fixture(scope="module")
def quick_training() -> Iterator[None]:
    """Training in this process without what takes most of the time of a run of a few steps.

    The fit of the lip code regards each of its 2,688 inputs alone, instead of solving several systems of as many
    equations; and validation has 4 examples instead of 64.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lips, "_solve", lambda gram, moment, ridge: moment / gram.diagonal()[:, None])
        patch.setattr(lips, "_RIDGES", (1.0,))
        patch.setattr(lips, "_FOLDS", 1)
        patch.setattr(records, "_VALIDATION_EXAMPLES", 4)
        yield


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, detector: Detector) -> list[str]:
    """Makes `prepare` work in this process, with that detector; returns the names of the sources that it tries."""
    return in_this_process(monkeypatch, detector)


def in_this_process(patch: pytest.MonkeyPatch, detector: Detector) -> list[str]:
    tried: list[str] = []

    def run(start: Callable, todo: list[Source], count: int) -> Iterator[tuple[Source, Finished | str]]:
        work = start(0)
        for source in todo:
            tried.append(source.name)
            yield source, work(source)

    patch.setattr(prepare, "run", run)
    patch.setattr(clip_worker, "Detector", lambda config, device, progress: detector)
    return tried


def cut(source: Path, target: Path, frames: int) -> None:
    """The beginning of a clip at its own frame rate, with as much sound."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(source)) as container:
        fps = int(float(container.streams.video[0].average_rate))
        pictures = [frame.to_ndarray(format="rgb24") for frame in islice(container.decode(video=0), frames)]
    sound = target.with_suffix(".wav")
    write_wav(sound, load_waveform(source)[: frames * SAMPLE_RATE // fps])
    write_video(target, pictures, sound, fps=fps)
    sound.unlink()


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def write_wav(path: Path, waveform: torch.Tensor) -> None:
    """A 16 kHz mono WAV file of samples (N,) in [-1, 1]."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((waveform * 32767).round().clamp(-32768, 32767).short().numpy().tobytes())


def decoded(path: Path) -> np.ndarray:
    """Every picture of a video as it is stored, (F, H, W, 3) uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def sound_seconds(path: Path) -> float:
    """The length of a file's sound, decoded."""

    def lengths() -> Iterator[float]:
        with av.open(str(path)) as container:
            for frame in container.decode(audio=0):
                yield frame.samples / frame.sample_rate

    return sum(lengths())
