"""The recipe that resamples weights for another picture size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from conftest import program
from typer.testing import CliRunner, Result

from dheads.conditioning import Cues
from dheads.config import Config, override, preset
from dheads.extensions.codes import codes_of
from dheads.extensions.motion import condition_with
from dheads.extensions.network import ExtendedUNet
from dheads.weights.checkpoints import build_model, load_checkpoint, save_checkpoint


def predict(unet: ExtendedUNet, pictures: torch.Tensor) -> torch.Tensor:
    """The network's prediction where x_t, identity and motion frames are all these pictures (B, 3, H, W)."""
    cond, tables, count = unet.config.conditioning, unet.config.extensions.codes, len(pictures)
    codes = {
        code.name: torch.ones(count, 2 * tables[code.name].context + 1, code.dims) for code in codes_of(unet.config)
    }
    condition = condition_with(
        unet.config,
        pictures,
        pictures[:, None].repeat(1, cond.motion_frames, 1, 1, 1),
        Cues(torch.ones(count, 2 * cond.audio_context + 1, cond.speech_dim), codes),
    )
    with torch.no_grad():
        return unet(pictures, torch.full((count,), 300), condition).prediction


def small(patch_size: int, detail_channels: int = 0) -> Config:
    patches = {"size": patch_size, "detail_channels": detail_channels}
    changes = {"network": {"image_size": 16 * patch_size}, "extensions": {"patches": patches}}
    return override(preset("tiny"), changes)


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(program("recipes/enlarge.py").main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(("old", "new", "detail"), [(3, 4, 0), (4, 6, 8)])
def test_predictions_for_a_larger_picture_are_those_for_the_smaller(
    tmp_path: Path, old: int, new: int, detail: int
) -> None:
    torch.manual_seed(0)
    unet = ExtendedUNet(small(old, detail_channels=detail)).eval()
    for name, parameter in unet.named_parameters():
        if "out_conv" in name and parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    save_checkpoint(tmp_path / "small.safetensors", unet.state_dict(), unet.config, {"license": "CC0"})
    done = run(
        "--weights",
        tmp_path / "small.safetensors",
        "--image-size",
        16 * new,
        "--patch-size",
        new,
        "--out",
        tmp_path / "large",
    )
    assert done.exit_code == 0, done.stderr
    checkpoint = load_checkpoint(tmp_path / "large")
    assert (checkpoint.config.network.image_size, checkpoint.config.extensions.patches.size) == (16 * new, new)
    assert checkpoint.info == {"license": "CC0"}
    smooth = F.interpolate(torch.rand(2, 3, 4, 4), size=192, mode="bicubic") * 2 - 1
    ours = predict(build_model(checkpoint), F.interpolate(smooth, size=16 * new, mode="area"))
    theirs = predict(unet, F.interpolate(smooth, size=16 * old, mode="area"))
    gap = F.interpolate(ours, size=16, mode="area") - F.interpolate(theirs, size=16, mode="area")
    assert gap.std() < 0.05 * theirs.std()


@pytest.mark.parametrize("patch_size", [3, 5])
def test_the_number_of_patches_stays(tmp_path: Path, patch_size: int) -> None:
    unet = ExtendedUNet(small(3))
    save_checkpoint(tmp_path / "small.safetensors", unet.state_dict(), unet.config, {})
    done = run(
        "--weights", tmp_path / "small.safetensors", "--image-size", 64, "--patch-size", patch_size, "--out", tmp_path
    )
    assert done.exit_code == 2
    assert "pictures must stay 16 patches wide" in done.stderr
