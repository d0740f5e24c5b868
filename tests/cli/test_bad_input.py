"""Bad input on the command line: an error of one line that names the file, exit code 1, no file written."""

from __future__ import annotations

import os
import shutil
import wave
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from dheads import cli
from dheads import config as configuration
from dheads.dataset import prepare
from dheads.dataset.dataset import Dataset
from dheads.dataset.layouts import find_sources
from dheads.errors import DheadsError
from dheads.evaluation import evaluate
from dheads.evaluation.turing import tally
from dheads.extensions.network import ExtendedUNet
from dheads.media.writing import write_clip, write_video
from dheads.sampling.jobs import Job, read_jobs
from dheads.training import loop as train
from dheads.weights import checkpoints as weights
from dheads.weights import listing

OUTPUT = "out.mp4"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: Path) -> Path:
    """A working folder with valid input: a photo face.*, 0.2 s of silence and untrained weights."""
    photo = next(examples.glob("face.*"))
    shutil.copy(photo, tmp_path / f"face{photo.suffix}")
    write_wav(tmp_path / "speech.wav", samples=3200)
    tiny = configuration.preset("tiny")
    weights.save_checkpoint(tmp_path / "weights.safetensors", ExtendedUNet(tiny).state_dict(), tiny, {})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_wav(path: Path, samples: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(2 * samples))


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def sample(
    face: str | None = None, audio: str = "speech.wav", output: str = OUTPUT, weights: str = "weights.safetensors"
) -> Result:
    face = face or str(next(Path().glob("face.*")))
    return run("sample", face, audio, "-o", output, "--weights", weights, "--steps", "1", "--device", "cpu", "--quiet")


def refused(done: Result, before: set[Path], *mentions: str) -> None:
    """Asserts an error of one line, and no file beyond those of `before`."""
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for mention in mentions:
        assert mention in done.stderr
    assert set(Path().rglob("*")) == before


def here() -> set[Path]:
    return set(Path().rglob("*"))


def test_valid_input() -> None:
    """The input that the other tests change one thing of."""
    done = sample()
    assert (done.exit_code, done.stdout) == (0, f"{OUTPUT}\n"), done.output
    assert Path(OUTPUT).stat().st_size > 0


# --- The photo


def test_missing_photo() -> None:
    refused(sample(face="absent.jpg"), here(), "absent.jpg")


def test_text_named_jpg() -> None:
    Path("note.jpg").write_text("This is not a photo.\n" * 50, encoding="utf-8")
    refused(sample(face="note.jpg"), here(), "note.jpg")


def test_empty_photo() -> None:
    Path("empty.jpg").touch()
    refused(sample(face="empty.jpg"), here(), "empty.jpg")


def test_cut_off_photo() -> None:
    face = next(Path().glob("face.*"))
    Path("part.jpg").write_bytes(face.read_bytes()[: face.stat().st_size // 5])
    refused(sample(face="part.jpg"), here(), "part.jpg", "cut by the picture's edge")
    Path("start.jpg").write_bytes(face.read_bytes()[:700])
    refused(sample(face="start.jpg"), here(), "start.jpg", "damaged")


def test_photo_without_a_face() -> None:
    ramp = np.linspace(0, 255, 256, dtype=np.uint8)
    Image.fromarray(np.stack([np.tile(ramp, (256, 1))] * 3, axis=-1)).save("wall.png")
    refused(sample(face="wall.png"), here(), "wall.png", "face")


# --- The sound


def test_missing_sound() -> None:
    refused(sample(audio="absent.wav"), here(), "absent.wav")


def test_text_named_wav() -> None:
    Path("note.wav").write_text("This is not sound.\n" * 50, encoding="utf-8")
    refused(sample(audio="note.wav"), here(), "note.wav")


def test_sound_of_no_length() -> None:
    write_wav(Path("silence.wav"), samples=0)
    refused(sample(audio="silence.wav"), here(), "silence.wav", "no sound")


def test_video_without_sound() -> None:
    with av.open("silent.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for value in range(10):
            picture = np.full((64, 64, 3), 20 * value, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    refused(sample(audio="silent.mp4"), here(), "silent.mp4", "no sound stream")


# --- The output


def test_output_folder_that_is_absent() -> None:
    refused(sample(output="nowhere/out.mp4"), here(), "nowhere")


def test_output_folder_that_is_a_file() -> None:
    Path("file").touch()
    refused(sample(output="file/out.mp4"), here(), "file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="this user may write everywhere")
def test_output_folder_that_is_read_only() -> None:
    Path("locked").mkdir(mode=0o500)
    refused(sample(output="locked/out.mp4"), here(), "locked")


def test_output_that_is_a_folder() -> None:
    Path("folder.mp4").mkdir()
    refused(sample(output="folder.mp4"), here(), "folder.mp4")


# --- The weights


def test_unknown_weights() -> None:
    refused(sample(weights="huge"), here(), "'huge'", "the known names are", "small")


def test_missing_weights_file() -> None:
    refused(sample(weights="absent.safetensors"), here(), "absent.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_cut_off_weights(share: float) -> None:
    content = Path("weights.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(content[: int(share * len(content))])
    refused(sample(weights="cut.safetensors"), here(), "cut.safetensors", "cut off")


def test_altered_weights() -> None:
    content = bytearray(Path("weights.safetensors").read_bytes())
    content[-1000] ^= 0xFF
    Path("altered.safetensors").write_bytes(content)
    refused(sample(weights="altered.safetensors"), here(), "altered.safetensors", "altered")


def test_checkpoint_of_another_kind() -> None:
    path = str(listing.ASSETS / listing.known()["whisper-tiny.en"]["file"])
    refused(sample(weights=path), here(), path, "not a checkpoint of dheads")


def test_pickled_checkpoint() -> None:
    torch.save({"state_dict": {}}, "model.ckpt")
    refused(sample(weights="model.ckpt"), here(), "model.ckpt", "no safetensors file")


# --- The other commands


def test_prepare_without_videos() -> None:
    Path("raw").mkdir()
    refused(run("prepare", "raw", "--out", "data"), here(), "raw")
    refused(run("prepare", "absent", "--out", "data"), here(), "absent")


def test_train_without_a_dataset() -> None:
    Path("raw").mkdir()
    refused(run("train", "--data", "raw", "--out", "run", "--preset", "tiny"), here(), "raw")
    refused(run("train", "--data", "absent", "--out", "run", "--preset", "tiny"), here(), "absent")


def test_eval_without_videos() -> None:
    Path("ours").mkdir()
    refused(run("eval", "ours", "--reference", "real"), here())
    refused(run("eval", "absent", "--reference", "ours"), here(), "absent")


# --- From Python


@pytest.mark.parametrize(
    "call",
    [
        lambda: prepare.prepare("absent", "data", configuration.preset("tiny")),
        lambda: train.train(configuration.preset("tiny"), "absent", "run"),
        lambda: evaluate.evaluate("absent", "reference"),
        lambda: evaluate.evaluate_weights("weights.safetensors", "absent", "test", "out", device="cpu"),
        lambda: Dataset("absent"),
        lambda: weights.load_checkpoint("absent"),
        lambda: find_sources("absent"),
        lambda: read_jobs("absent", Job("face.jpg", "speech.wav", "o.mp4")),
        lambda: tally(["votes.json"], "absent"),
        lambda: write_clip("absent/o.mp4", [], torch.zeros(1)),
        lambda: write_video("absent/o.mp4", [], "speech.wav"),
    ],
)
def test_a_path_as_text_is_a_path(call: Callable[[], object]) -> None:
    before = here()
    with pytest.raises(DheadsError, match="absent"):
        call()
    assert here() == before
