"""The recipe that fits the lip code of weights to a dataset again."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from real_data import Prepared

from dheads.config import override, preset
from dheads.dataset.dataset import Dataset
from dheads.errors import DheadsError
from dheads.extensions.lips import LipPredictor
from dheads.extensions.network import ExtendedUNet
from dheads.weights.checkpoints import load_checkpoint, save_checkpoint

pytest_plugins = "real_data"
pytestmark = pytest.mark.usefixtures("quick_training")


def fit(*arguments: object) -> None:
    runpy.run_path(str(ROOT / "recipes" / "fit_lips.py"))["main"](*arguments)


def test_only_the_lip_code_changes(prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = preset("tiny")
    unet = ExtendedUNet(config)
    save_checkpoint(tmp_path / "old.safetensors", unet.state_dict(), config, {"license": "theirs"})
    fit(prepared.data, tmp_path / "new.safetensors", str(tmp_path / "old.safetensors"))
    assert "correlation on speakers left out: " in capsys.readouterr().err
    made = load_checkpoint(tmp_path / "new.safetensors")
    wanted = LipPredictor(config.conditioning.speech_dim)
    wanted.fit(Dataset(prepared.data).lip_clips("train"))
    for name, tensor in made.tensors.items():
        own = wanted.state_dict().get(name.removeprefix("lips."), unet.state_dict()[name])
        torch.testing.assert_close(tensor, own)
    assert wanted.weight.abs().max() > 0
    assert (made.config, made.info) == (config, {"license": "theirs"})


def test_weights_without_a_lip_code_are_refused(prepared: Prepared, tmp_path: Path) -> None:
    small = {"model_channels": 32, "image_size": 32, "num_res_blocks": 1}
    config = override(preset("crema"), {"network": small})
    save_checkpoint(tmp_path / "old.safetensors", ExtendedUNet(config).state_dict(), config, {})
    with pytest.raises(DheadsError, match=r"old.safetensors has no lip code"):
        fit(prepared.data, tmp_path / "new.safetensors", str(tmp_path / "old.safetensors"))
