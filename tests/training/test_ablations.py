"""The paper's ablations by configuration alone: each trains and samples by the functions behind the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_data import Prepared, dheads

from dheads.config import override, preset
from dheads.dataset.dataset import Dataset
from dheads.sampling.engine import Engine
from dheads.sampling.talker import generate
from dheads.training.loop import train
from dheads.weights.checkpoints import load_model

pytest_plugins = "real_data"
pytestmark = pytest.mark.usefixtures("quick_training")

# The paper's method in a small network: it predicts noise and variance, with the paper's losses.
PAPER = override(
    preset("tiny"),
    {
        "network": {"learned_variance": True, "dropout": 0.1},
        "diffusion": {"prediction": "eps"},
        "sampling": {"steps": 3, "solver": "ddpm"},
        "optimisation": {"steps": 2, "batch_size": 2, "lr_schedule": "paper"},
        "run": {"log_every": 1, "checkpoint_every": 2, "sample_clips": 0},
        "extensions": {
            "snr_clip": None,
            "copying": {"gates": False},
            "motion": {"noise": 0.0, "hide_mouth": False, "drift": 0.0, "start_share": 0.0},
            "codes": {"lips": None, "eyes": None},
            "sound": {"dropout": 0.0},
            "examples": {"balance": "clips", "augment": False},
        },
    },
)
ABLATIONS: dict[str, dict[str, Any]] = {
    **{f"motion frames {m}": {"conditioning": {"motion_frames": m}} for m in (0, 1, 2, 3)},
    **{f"audio context {m}": {"conditioning": {"audio_context": m}} for m in (0, 1, 3)},
    "grayscale": {"conditioning": {"grayscale_motion": True}},
    "grayscale without motion frames": {"conditioning": {"grayscale_motion": True, "motion_frames": 0}},
    "no lip loss": {"optimisation": {"lambda_lip": 0.0}},
    "attention at 16 px": {"network": {"attn_resolutions": [16]}},
    "first frame as identity": {"conditioning": {"identity_frame": "first"}},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation(prepared: Prepared, tmp_path: Path, name: str) -> None:
    config = override(PAPER, ABLATIONS[name])
    train(config, prepared.data, tmp_path, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        total = row["simple"] + 1e-4 * row["vlb"] + config.optimisation.lambda_lip * row["lip"]
        assert row["loss"] == pytest.approx(total, rel=1e-4)
        assert row["vlb"] > 0
    unet, loaded, _ = load_model(str(tmp_path / "weights.safetensors"))
    assert loaded == config
    dataset = Dataset(prepared.data)
    clip = dataset.split("val")[0]
    speech = dataset.labels(clip)["speech"][:3]
    frames = np.stack(list(generate(Engine(unet), dataset.frames(clip)[0], speech)))
    assert frames.shape == (3, 32, 32, 3)
    assert frames.std() > 10, "a picture"


def test_an_ablation_by_the_command_line(prepared: Prepared, tmp_path: Path) -> None:
    sets = ["conditioning.motion_frames=0", "extensions.copying.gates=false", "extensions.codes.lips=false"]
    sets.append("optimisation.steps=1")
    changes = [part for one in sets for part in ("--set", one)]
    done = dheads("train", "--data", prepared.data, "--out", tmp_path / "run", "--preset", "tiny", *changes)
    assert done.exit_code == 0, done.stderr
    assert "motion_frames = 0" in (tmp_path / "run" / "config.toml").read_text(encoding="utf-8")
    assert "codes.lips" not in (tmp_path / "run" / "config.toml").read_text(encoding="utf-8")
