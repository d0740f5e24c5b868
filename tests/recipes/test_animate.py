"""The recipe that animates photos with the motion of real clips."""

from __future__ import annotations

import csv
import subprocess
import sys
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT
from real_data import copy, decoded, sound_seconds, write_wav

from dheads.config import FPS
from dheads.faces.alignment import eye_distance, mouth_opening
from dheads.faces.mesh import MeshBackend
from dheads.media.photos import load_photo
from dheads.media.reading import read_frames
from dheads.media.sound import SAMPLES_PER_FRAME, load_waveform
from dheads.media.writing import write_video

FRAMES = 20
ROWS = [
    ("stills/001.jpg", "still_001", "train"),
    ("stills/noface.png", "still_noface", "train"),
    ("stills/005.jpg", "still_005", "train"),
    ("stills/020.jpg", "still_020", "val"),
    ("talkvid/driver.mp4", "driver", "train"),
]


def run(raw: Path) -> subprocess.CompletedProcess[str]:
    folders = {"--stills": raw / "stills", "--clips": raw / "talkvid", "--out": raw / "animated"}
    options = [
        str(part) for pair in {**folders, "--splits": raw / "splits.csv", "--frames": FRAMES}.items() for part in pair
    ]
    command = [sys.executable, ROOT / "recipes" / "animate.py", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def raw(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clip and photos, of which one has no face and one is held out, after animation."""
    folder = tmp_path_factory.mktemp("raw")
    for name in ("001", "005", "020"):
        copy(shared / "data" / "stills" / f"{name}.jpg", folder / "stills" / f"{name}.jpg")
    cv2.imwrite(str(folder / "stills" / "noface.png"), np.full((128, 128, 3), 90, np.uint8))
    source, sound = shared / "data" / "talkvid" / "Age_31-45_1.mp4", folder / "sound.wav"
    (folder / "talkvid").mkdir()
    write_wav(sound, load_waveform(source)[: FRAMES * SAMPLES_PER_FRAME])
    # It has as many frames as a video, so that there is only one stretch to choose.
    write_video(folder / "talkvid" / "driver.mp4", islice(read_frames(source), FRAMES), sound)
    with (folder / "splits.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("clip", "speaker", "split"), *ROWS])
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stdout + done.stderr
    assert "noface.png: no face found" in done.stdout + done.stderr
    return folder


def test_the_photos_of_the_train_split_are_animated(raw: Path) -> None:
    assert sorted(path.name for path in (raw / "animated").iterdir()) == ["001.mp4", "005.mp4", "splits.csv"]
    with (raw / "animated" / "splits.csv").open(encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["clip", "speaker", "split"],
            ["animated/001.mp4", "still_001", "train"],
            ["animated/005.mp4", "still_005", "train"],
        ]


@pytest.mark.parametrize("name", ["001", "005"])
def test_a_video_has_the_size_of_its_photo_and_the_given_length(raw: Path, name: str) -> None:
    path = raw / "animated" / f"{name}.mp4"
    height, width = load_photo(raw / "stills" / f"{name}.jpg").shape[:2]
    assert decoded(path).shape == (FRAMES, height // 2 * 2, width // 2 * 2, 3)
    assert sound_seconds(path) == pytest.approx(FRAMES / FPS, abs=0.1)


@pytest.mark.parametrize("name", ["001", "005"])
def test_the_mouth_opens_as_the_drivers_does(raw: Path, name: str) -> None:
    paths = (raw / "animated" / f"{name}.mp4", raw / "talkvid" / "driver.mp4")
    ours, theirs = (mouth_opening(MeshBackend().track(read_frames(path))) for path in paths)
    assert np.corrcoef(ours, theirs)[0, 1] > 0.7


@pytest.mark.parametrize("name", ["001", "005"])
def test_other_parts_than_the_mouth_hardly_move(raw: Path, name: str) -> None:
    photo, backend = load_photo(raw / "stills" / f"{name}.jpg"), MeshBackend()
    (face, *_), moved = backend.detect(photo), backend.track(read_frames(raw / "animated" / f"{name}.mp4"))
    corners = [36, 39, 42, 45]
    far = np.linalg.norm(moved[:, corners] - face.landmarks[corners], axis=-1) / eye_distance(face.landmarks)
    assert far.max() < 0.3
    # A corner of the picture, which moves a little with the whole.
    corner = decoded(raw / "animated" / f"{name}.mp4")[FRAMES // 2, :24, :24].astype(float)
    assert np.abs(corner.mean(axis=(0, 1)) - photo[:24, :24].mean(axis=(0, 1))).max() < 12


def test_existing_videos_are_not_made_again(raw: Path) -> None:
    paths = sorted((raw / "animated").glob("*.mp4"))
    before = [path.stat().st_mtime_ns for path in paths]
    done = run(raw)
    assert done.returncode == 0
    assert "watch" not in done.stderr  # no clip is analysed either
    assert [path.stat().st_mtime_ns for path in paths] == before
