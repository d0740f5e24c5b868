"""prepare -> train -> sample -> eval through the command line on real clips, and what goes to which stream."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_data import Prepared, decoded, dheads, sound_seconds
from typer.testing import Result

from dheads.config import preset
from dheads.faces import alignment as faces
from dheads.faces.landmarks import find_face, load_backend
from dheads.media.photos import load_photo

pytest_plugins = "real_data"

STEPS = 40
FRAMES = 20  # of the held-out clip


@dataclass
class Walk:
    """What the four commands printed and made."""

    prepare: Result
    train: Result
    sample: Result
    eval: Result
    root: Path


@pytest.fixture(scope="module")
def walk(prepared: Prepared, quick_training: None, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """Train on the prepared clips; the held-out speaker's first frame and sound make a video to compare."""
    root = tmp_path_factory.mktemp("walk")
    real = prepared.raw / "grid" / "other.mp4"
    Image.fromarray(decoded(real)[0]).save(root / "face.png")
    changes = [f"run.{key}={value}" for key, value in (("checkpoint_every", STEPS), ("sample_every", STEPS))]
    sets = [part for change in changes for part in ("--set", change)]
    train = dheads(
        "train", "--data", prepared.data, "--out", root / "run", "--preset", "tiny", "--device", "cpu", *sets
    )
    weights = train.stdout.removesuffix("\n")  # as the shell's $(dheads train ...) passes it on
    size = ("--steps", 4, "--solver", "dpm++2m", "--size", 224, "--device", "cpu", "--json")
    sample = dheads("sample", root / "face.png", real, "-o", root / "video.mp4", "--weights", weights, *size)
    options = ("--reference", real, "--out", root / "report", "--size", 32, "--json", "--quiet")
    return Walk(prepared.done, train, sample, dheads("eval", root / "video.mp4", *options), root)


def test_every_command_succeeds(walk: Walk) -> None:
    for done in (walk.prepare, walk.train, walk.sample, walk.eval):
        assert done.exit_code == 0, done.stderr


def test_results_go_to_stdout_and_messages_to_stderr(walk: Walk, prepared: Prepared) -> None:
    assert walk.prepare.stdout == f"{prepared.data}\n"
    assert "6 clips, 0.00 hours, 103 frames, 5 speakers" in walk.prepare.stderr
    assert walk.train.stdout == f"{walk.root / 'run' / 'weights.safetensors'}\n"
    assert f"{STEPS}/{STEPS}" in walk.train.stderr
    assert walk.sample.stdout.count("\n") == 1
    assert "frame/s" in walk.sample.stderr
    assert walk.eval.stderr == "", "--quiet"


def test_json_is_one_line_that_parses(walk: Walk) -> None:
    result = json.loads(walk.sample.stdout)
    assert Path(result["path"]) == walk.root / "video.mp4"
    assert result["frames"] == len(decoded(walk.root / "video.mp4"))
    report = json.loads(walk.eval.stdout)
    assert walk.eval.stdout.count("\n") == 1
    assert report["summary"]["clips"] == 1


def test_the_video_has_the_clips_length_and_sound(walk: Walk, prepared: Prepared) -> None:
    frames = decoded(walk.root / "video.mp4")
    assert frames.shape[1:] == (224, 224, 3)
    assert FRAMES <= len(frames) <= FRAMES + 1  # AAC pads its sound to whole blocks
    assert sound_seconds(walk.root / "video.mp4") == pytest.approx(
        sound_seconds(prepared.raw / "grid" / "other.mp4"), abs=1e-6
    ), "the clip's sound is copied"


def test_the_video_shows_the_person_of_the_photo(walk: Walk) -> None:
    """After a few steps already: what stands still is copied from the photo."""
    frames = decoded(walk.root / "video.mp4").astype(float)
    photo = load_photo(walk.root / "face.png")
    face, _ = find_face(photo, load_backend("mesh"), "the photo")
    matrix = faces.align_transforms(face.landmarks[None], preset("tiny").alignment, 224)[0]
    wanted = faces.warp(photo, matrix, 224).astype(float)
    above_the_mouth = slice(40, 110)
    a, b = frames[:, above_the_mouth].mean(axis=0).ravel(), wanted[above_the_mouth].ravel()
    assert np.corrcoef(a, b)[0, 1] > 0.9


def test_eval_measures_it(walk: Walk) -> None:
    report = json.loads(walk.eval.stdout)
    (clip,) = report["clips"]
    row = clip["values"]
    assert clip["clip"] == "video"
    assert row["frames"] == FRAMES
    assert -1 <= row["mouth_correlation"] <= 1
    assert row["identity_shape"] < 0.2, "the face was found, and is the person's"
    assert json.loads((walk.root / "report" / "report.json").read_text(encoding="utf-8")) == report
    with (walk.root / "report" / "clips.csv").open(newline="", encoding="utf-8") as file:
        (written,) = csv.DictReader(file)
    assert written.pop("clip") == "video"
    assert {name: float(value) for name, value in written.items()} == pytest.approx(row, rel=1e-4)
    assert "data:video/mp4;base64," in (walk.root / "report" / "report.html").read_text(encoding="utf-8")


def test_training_logs_its_progress(walk: Walk) -> None:
    rows = [json.loads(line) for line in (walk.root / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert rows[-1]["val_simple"] < 0.75 * rows[0]["val_simple"]
    (video,) = (walk.root / "run" / "samples").iterdir()
    assert len(decoded(video)) == FRAMES
