"""The configuration for weights that move the head."""

from __future__ import annotations

import tomllib

import torch
from conftest import ROOT

from dheads.config import override, preset
from dheads.extensions.network import ExtendedUNet
from dheads.weights.checkpoints import load_model


def test_the_packaged_weights_can_be_trained_on_to_move_the_head() -> None:
    config = override(preset("small"), tomllib.loads((ROOT / "recipes" / "moving.toml").read_text(encoding="utf-8")))
    start, _, _ = load_model("small")
    unet = ExtendedUNet(config)
    unet.start_from(start.state_dict())
    assert torch.equal(unet.out_conv.weight, start.out_conv.weight)
    known = start.stem.weight.shape[1]
    assert torch.equal(unet.stem.weight[:, :known], start.stem.weight)
    assert unet.stem.weight[:, known:].shape[1] == 3 * config.extensions.patches.size**2, "the photo moved"
    assert not unet.stem.weight[:, known:].any()
    assert unet.head_motion is not None
    assert not unet.head_motion.moves, "it is fitted when training begins"
