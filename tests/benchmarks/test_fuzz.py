"""Hostile input: what fuzzing found, a little of it on every run, and the judge of benchmarks/fuzz.py."""

from __future__ import annotations

import io
import math
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
import torch
import torchaudio.functional as AF
from conftest import ROOT, program

from dheads.errors import DheadsError
from dheads.media import sound as reading
from dheads.media.containers import opened, sound_in_step
from dheads.media.photos import load_photo
from dheads.media.sound import load_waveform
from dheads.media.writing import write_video

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the program is for Linux")

PROGRAM = ROOT / "benchmarks" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """benchmarks/fuzz.py"""
    return program("benchmarks/fuzz.py")


# --- A little of it


def test_forty_mutations_load_or_are_refused_in_one_sentence(fuzz: ModuleType, tmp_path: Path) -> None:
    outcomes = []
    for case in fuzz.mutations(40, seed=1):
        path = tmp_path / case.name
        case.make(path)
        try:
            loaded = load_photo(path) if case.is_photo else load_waveform(path).numpy()
        except DheadsError as error:
            said = str(error)
            outcomes.append("refused")
        else:
            assert loaded.dtype == (np.uint8 if case.is_photo else np.float32)
            assert np.isfinite(loaded).all()
            assert loaded.size > 0
            said = str(path)
            outcomes.append("loaded")
        assert str(path) in said
        assert "\n" not in said
    assert set(outcomes) == {"refused", "loaded"}


@pytest.mark.parametrize("table", ["BAD_PHOTOS", "BAD_SOUNDS"])
def test_files_made_to_be_hostile_load_or_are_refused(fuzz: ModuleType, tmp_path: Path, table: str) -> None:
    load = load_photo if table == "BAD_PHOTOS" else load_waveform
    for name, content in getattr(fuzz, table).items():
        if re.search("[0-9]{4}px|bomb", name):
            continue  # seconds each
        path = tmp_path / name
        path.write_bytes(content())
        try:
            load(path)
        except DheadsError as error:
            assert str(path) in str(error)  # noqa: PT017


# --- What it found


def test_damaged_avif_photos(fuzz: ModuleType, tmp_path: Path) -> None:
    """Their reader raises a RuntimeError."""
    whole = fuzz.photos()["avif"]
    refused = 0
    for seed in range(30):
        (tmp_path / "a.avif").write_bytes(fuzz.end_fields(whole, random.Random(seed)))
        try:
            load_photo(tmp_path / "a.avif")
        except DheadsError:
            refused += 1
    assert refused > 3


@pytest.mark.parametrize("name", ["adpcm", "1e38", "doubles-1e308", "64-channels", "nan", "late-stamp", "frames-only"])
def test_odd_sound_stands_beside_a_picture(fuzz: ModuleType, tmp_path: Path, name: str) -> None:
    file = next(file for file in fuzz.BAD_SOUNDS if file.startswith(f"{name}."))
    (tmp_path / file).write_bytes(fuzz.BAD_SOUNDS[file]())
    picture = np.zeros((32, 32, 3), np.uint8)
    seconds = len(load_waveform(tmp_path / file)) / 16_000
    write_video(tmp_path / "o.mp4", [picture] * math.ceil(25 * seconds), tmp_path / file)
    assert fuzz._undecodable(tmp_path / "o.mp4") is None
    assert len(load_waveform(tmp_path / "o.mp4")) / 16_000 == pytest.approx(seconds, abs=0.15)


def test_damaged_packets_of_copied_sound_are_left_out(fuzz: ModuleType, tmp_path: Path) -> None:
    """MPEG-TS, whose AAC must be taken out of its frames for MP4."""
    whole = fuzz.sounds()["ts"]
    for seed in range(8):
        (tmp_path / "a.ts").write_bytes(fuzz.many_bits(whole, random.Random(seed)))
        try:
            load_waveform(tmp_path / "a.ts")
        except DheadsError:
            continue
        write_video(tmp_path / f"{seed}.mp4", [np.zeros((32, 32, 3), np.uint8)] * 10, tmp_path / "a.ts")
    assert len(list(tmp_path.glob("*.mp4"))) > 3


@pytest.mark.parametrize("load", [load_photo, load_waveform])
def test_names_that_are_no_files(fuzz: ModuleType, tmp_path: Path, load: Callable[[Path], object]) -> None:
    for name, make in fuzz.ODD_PATHS.items():
        make(tmp_path / name)
        with pytest.raises(DheadsError) as refused:
            load(tmp_path / name)
        assert str(tmp_path / name) in str(refused.value)


@pytest.mark.parametrize("name", ["fifo", "link-to-zero", "link-to-null"])
def test_sound_that_never_begins_or_ends_is_refused(fuzz: ModuleType, tmp_path: Path, name: str) -> None:
    fuzz.ODD_PATHS[name](tmp_path / name)
    with (
        pytest.raises(DheadsError, match=f"{name} is a pipe or a device; give a sound file"),
        opened(tmp_path / name, name, "sound"),
    ):
        pass


@pytest.mark.parametrize("rate", [16_000, 44_100, 44_101])
def test_long_sound_is_resampled_a_minute_at_a_time(rate: int) -> None:
    sound = np.random.default_rng(0).standard_normal(61 * rate + 17, np.float32)
    ratio = Fraction(16_000, rate).limit_denominator(2000)
    at_once = AF.resample(torch.from_numpy(sound), ratio.denominator, ratio.numerator)
    pieces = list(reading._resampled(np.array_split(sound, 70), rate))
    assert len(pieces) == 2
    assert torch.equal(torch.cat(pieces), at_once)


def test_hours_at_a_high_rate_never_wait_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    monkeypatch.setattr(reading, "resample", lambda samples, ratio: lengths.append(len(samples)) or torch.zeros(10**6))
    rate, chunk = 1_000_000, np.zeros(1_000_000, np.float32)
    for _ in reading._resampled((chunk for _ in range(150)), rate):
        assert lengths[-1] <= 62 * rate
    assert sum(lengths) >= 150 * rate


def test_a_long_gap_at_a_high_rate_is_silence_in_small_pieces(fuzz: ModuleType) -> None:
    with av.open(io.BytesIO(fuzz.late_sound(500))) as container:
        pieces = [chunk.samples.shape[1] for chunk in sound_in_step(container, container.streams.audio[0])]
    assert max(pieces) == 16_000
    assert sum(pieces) == 500 * 16_000 + 1600


def test_one_damaged_time_stamp_is_not_minutes_of_silence(fuzz: ModuleType) -> None:
    whole, late = (load_waveform(io.BytesIO(content)) for content in (fuzz.sounds()["ts"], fuzz.late_stamp()))
    assert len(late) == pytest.approx(len(whole), abs=16)
    n = min(len(whole), len(late))
    assert torch.corrcoef(torch.stack([whole[:n], late[:n]]))[0, 1] > 0.9


# --- The judge


def judged(fuzz: ModuleType, folder: Path, code: int, said: str, megabytes: float = 100) -> list[str]:
    outcome, lines = fuzz._judged(code, said, megabytes, "bad.wav", folder, fuzz.Limits(10, 2500))
    return lines if outcome == "fault" else [outcome]


def test_the_judge(fuzz: ModuleType, tmp_path: Path) -> None:
    refusal = "error: bad.wav is no sound\n"
    assert judged(fuzz, tmp_path, 1, refusal) == ["refused"]
    assert "does not name" in judged(fuzz, tmp_path, 1, "error: that is no sound\n")[0]
    assert "no single line" in judged(fuzz, tmp_path, 1, f"{refusal}and more\n")[0]
    assert fuzz._judged(1, "error: a\\nb is no sound\n", 1, "a\nb", tmp_path, fuzz.Limits(10, 2500))[0] == "refused"
    assert judged(fuzz, tmp_path, 1, refusal, megabytes=2501)[0] == "took 2501 MB"
    assert judged(fuzz, tmp_path, -signal.SIGALRM, "")[0] == "took more than 10 s"
    assert judged(fuzz, tmp_path, -signal.SIGSEGV, "")[0] == "exit code -11: "
    assert judged(fuzz, tmp_path, 70, "Traceback")[0] == "exit code 70: Traceback"
    assert judged(fuzz, tmp_path, 0, "")[0] == "no video"
    (tmp_path / ".out.mp4.0123abcd.part").touch()
    assert "behind" in judged(fuzz, tmp_path, 1, refusal)[0]
    (tmp_path / ".out.mp4.0123abcd.part").replace(tmp_path / fuzz.OUTPUT)
    assert judged(fuzz, tmp_path, 1, refusal)[0] == "a video beside an error"
    assert "cannot be decoded" in judged(fuzz, tmp_path, 0, "")[0]
    (tmp_path / fuzz.OUTPUT).write_bytes(fuzz.sounds()["mp4"])
    assert judged(fuzz, tmp_path, 0, "") == ["video"]


def test_the_program_runs(warm: list[str]) -> None:
    """One photo that is refused, and one sound that makes a video."""
    done = subprocess.run(
        [*warm, str(PROGRAM), "--mutations", "1", "--only", "crafted one-", "--seconds", "60"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| crafted | 1 | 1 | 0 |" in done.stdout
