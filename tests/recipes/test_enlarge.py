"""The recipe that makes weights for larger pictures of weights for smaller ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from dheads.config import Config, build, override, preset
from dheads.extensions.network import ExtendedUNet
from dheads.weights.checkpoints import build_model, load_checkpoint, save_checkpoint


def say(unet: ExtendedUNet, pictures: torch.Tensor) -> torch.Tensor:
    """What the network predicts where all its pictures are these, (B, 3, H, W)."""
    told, count = unet.config.conditioning, len(pictures)
    condition = build(
        unet.config,
        pictures,
        pictures[:, None].repeat(1, told.motion_frames, 1, 1, 1),
        torch.ones(count, 2 * told.audio_context + 1, told.speech_dim),
        torch.ones(count, 2 * told.lip_context + 1, told.lip_dims),
        eye_window=torch.ones(count, 2 * told.eye_context + 1, told.eye_dims),
    )
    with torch.no_grad():
        return unet(pictures, torch.full((count,), 300), condition).prediction


def small(patch_size: int, **model: int) -> Config:
    return override(preset("tiny"), {"model": {"image_size": 16 * patch_size, "patch_size": patch_size, **model}})


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "recipes" / "enlarge.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("old", "new", "detail"), [(3, 4, 0), (4, 6, 8)])
def test_it_says_of_a_larger_picture_what_it_said_of_the_smaller(
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
    assert done.returncode == 0, done.stderr
    checkpoint = load_checkpoint(tmp_path / "large")
    assert (checkpoint.config.network.image_size, checkpoint.config.extensions.patches.size) == (16 * new, new)
    assert checkpoint.info == {"license": "CC0"}
    smooth = F.interpolate(torch.rand(2, 3, 4, 4), size=192, mode="bicubic") * 2 - 1
    ours = say(build_model(checkpoint), F.interpolate(smooth, size=16 * new, mode="area"))
    theirs = say(unet, F.interpolate(smooth, size=16 * old, mode="area"))
    gap = F.interpolate(ours, size=16, mode="area") - F.interpolate(theirs, size=16, mode="area")
    assert gap.std() < 0.05 * theirs.std()


@pytest.mark.parametrize("patch_size", [3, 5])
def test_the_number_of_patches_stays(tmp_path: Path, patch_size: int) -> None:
    unet = ExtendedUNet(small(3))
    save_checkpoint(tmp_path / "small.safetensors", unet.state_dict(), unet.config, {})
    done = run(
        "--weights", tmp_path / "small.safetensors", "--image-size", 64, "--patch-size", patch_size, "--out", tmp_path
    )
    assert done.returncode == 2
    assert "pictures must stay 16 patches wide" in done.stderr
