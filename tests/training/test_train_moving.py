"""Training and sampling through the command line where the photo is moved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from real_data import Prepared, dheads, write_wav

from dheads.media.reading import read_frames
from dheads.media.sound import load_waveform
from dheads.weights.checkpoints import load_model

pytest_plugins = "real_data"
pytestmark = pytest.mark.usefixtures("quick_training")

MOVING = [
    "extensions.copying.gates=false",
    "extensions.warp.flow=true",
    "extensions.codes.pose.context=0",
    "extensions.mouth.channels=12",
]


def test_a_run_with_the_photo_moved_makes_weights_that_sample(
    prepared: Prepared, examples: Path, tmp_path: Path
) -> None:
    """With roll-outs, validation, sample videos and a state to go on from."""
    sets = [*MOVING, "optimisation.steps=6", "extensions.rollouts.start=0.5", "run.log_every=2", "run.sample_clips=1"]
    flags = [part for one in sets for part in ("--set", one)]
    command = ["train", "--data", prepared.data, "--out", tmp_path / "run", "--device", "cpu", "--quiet", *flags]
    done = dheads(*command)
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(row["landmarks"] > 0 < row["moved"] and 0 < row["own"] < 1 for row in rows)
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1
    unet, config, _ = load_model(str(tmp_path / "run" / "weights.safetensors"))
    assert config.extensions.warp.flow
    assert unet.flow_head is not None
    assert unet.head_motion is not None
    assert unet.mouth is not None
    assert (unet.mouth.out.weight == 0).all(), "it is trained apart"
    weights = ["--weights", tmp_path / "run" / "weights.safetensors", "--steps", 2, "--quiet"]
    write_wav(tmp_path / "short.wav", load_waveform(examples / "speech.wav")[16_000 : 16_000 + 12 * 640])
    made = dheads("sample", examples / "face.jpg", tmp_path / "short.wav", "-o", tmp_path / "out.mp4", *weights)
    assert made.exit_code == 0, made.stderr
    assert np.stack(list(read_frames(tmp_path / "out.mp4"))).shape == (12, 256, 256, 3)
