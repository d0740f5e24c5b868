"""`dheads.load`: what a notebook gives and gets."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dheads.errors import DheadsError
from dheads.media.photos import load_photo
from dheads.media.sound import load_waveform, wav_file
from dheads.sampling.talker import Talker


@pytest.fixture
def talker(packaged: Talker, untried: None) -> Talker:
    return packaged


def test_arrays_give_the_frames_of_files(talker: Talker, examples: Path, tmp_path: Path) -> None:
    waveform = load_waveform(examples / "speech.wav")[8_000:11_840]
    (tmp_path / "speech.wav").write_bytes(wav_file(waveform).getvalue())
    of_files = list(talker.frames(str(examples / "face.jpg"), str(tmp_path / "speech.wav"), seed=3))
    of_arrays = list(talker.frames(load_photo(examples / "face.jpg", []), waveform, seed=3))
    assert len(of_files) == 6
    assert of_files[0].shape == (256, 256, 3)
    assert np.array_equal(of_files, of_arrays)


def test_a_video_is_written_from_arrays(talker: Talker, examples: Path, tmp_path: Path) -> None:
    picture = load_photo(examples / "face.jpg", [])
    seen: list[tuple[int, int | None]] = []
    sound, output = torch.zeros(3_200), str(tmp_path / "out.mp4")
    result = talker.sample(picture, sound, output, size=64, on_frame=lambda *counts: seen.append(counts))
    assert (result.path, result.frames, result.seconds) == (tmp_path / "out.mp4", 5, 0.2)
    assert result.path.stat().st_size > 1_000
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_what_on_frame_raises_ends_the_work(talker: Talker, examples: Path, tmp_path: Path) -> None:
    def enough(made: int, expected: int | None) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        talker.sample(examples / "face.jpg", examples / "speech.wav", tmp_path / "out.mp4", size=64, on_frame=enough)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("picture", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((8, 8, 4), np.uint8)])
def test_an_array_that_is_no_picture_is_refused(talker: Talker, picture: np.ndarray) -> None:
    with pytest.raises(DheadsError, match=r"is an array of shape .*; give \(H, W, 3\) uint8 RGB"):
        next(talker.frames(picture, torch.zeros(3_200)))


def test_both_ways_take_the_same_options() -> None:
    sample, frames = (inspect.signature(way).parameters for way in (Talker.sample, Talker.frames))
    assert set(sample) - set(frames) == {"output", "audio_codec", "on_frame"}
    assert not set(frames) - set(sample)
    assert all(
        parameter.annotation is not inspect.Parameter.empty for name, parameter in sample.items() if name != "self"
    )


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"motion": 5}, "motion=5 must be a number from 0 to 2"),
        ({"guidance": float("nan")}, "guidance=nan must be a number from 0 to 20"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0 to 9223372036854775807"),
        ({"size": 9000}, "size=9000 must be a whole number from 16 to 8192"),
        ({"steps": 1.5}, "steps=1.5 must be a whole number from 1 to 100000"),
        ({"solver": "heun"}, "solver='heun' must be one of ddpm, ddim, dpm++2m"),
        ({"size": 4098}, "the video has size=4098, but only with paste may it be more than 4096 px"),
        ({"still": True, "motion": 1}, "the video has still and a motion, but a still head does not move; leave one of "
         "them out"),
    ],
)  # fmt: skip
def test_settings_have_the_limits_of_the_command_line(
    talker: Talker, examples: Path, tmp_path: Path, options: dict[str, Any], fault: str
) -> None:
    with pytest.raises(DheadsError) as raised:
        talker.sample(examples / "face.jpg", examples / "speech.wav", tmp_path / "out.mp4", **options)
    assert str(raised.value) == fault
    with pytest.raises(DheadsError):
        next(talker.frames(examples / "face.jpg", examples / "speech.wav", **options))
    assert not (tmp_path / "out.mp4").exists()
