"""The authors' released networks: their tensors under our names, and their configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dheads.config import ConditioningConfig, Config, DiffusionConfig, NetworkConfig, preset
from dheads.errors import DheadsError
from dheads.weights.torchscript import load_script


def read_network(path: Path, args: dict[str, Any]) -> tuple[Config, dict[str, Tensor]]:
    """Configuration and float32 tensors, under our names, of a released TorchScript network.

    args: the network's arguments, by the released code's names.
    """
    state = from_released(load_script(path).state_dict())
    return config_from_released(args), {name: tensor.detach().float() for name, tensor in state.items()}


# --- Names

_PARTS = {
    "in_layers.0": "in_norm",
    "in_layers.2": "in_conv",
    "t_emb_layers.1": "time_affine",
    "audio_emb_layers.1": "audio_affine",
    "out_layers.0": "out_norm",
    "out_layers.3": "out_conv",
    "skip_connection": "skip",
    "norm": "norm",
    "qkv": "qkv",
    "proj_out": "proj",
}
_TOPS = {
    "time_embed.fc.0": "time_embed.0",
    "time_embed.fc.2": "time_embed.2",
    "audio_embed.0": "audio_embed.0",
    "audio_embed.2": "audio_embed.2",
    "input_blocks.0.0": "stem",
    "out.0": "out_norm",
    "out.2": "out_conv",
}
_BLOCK = re.compile(r"(?:(input|output)_blocks\.(\d+)|(middle)_block)\.(\d+)\.(.+)")
_PREFIXES = ("unet.", "diffusion.nn_backbone.")


def from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the released code under our names.

    The authors' demo stores every tensor once, their training code twice, under two prefixes. Raises DheadsError for
    an unknown name, and where the two copies differ.
    """
    ours: dict[str, Tensor] = {}
    prefixed = any(name.startswith(_PREFIXES) for name in state)
    for released, tensor in state.items():
        plain = released
        if prefixed:
            prefix = next((prefix for prefix in _PREFIXES if released.startswith(prefix)), None)
            if prefix is None:  # tables of the diffusion, which the configuration determines
                continue
            plain = released.removeprefix(prefix)
        module, _, leaf = plain.rpartition(".")
        name = f"{_rename(module)}.{leaf}"
        if name in ours and not torch.equal(ours[name], tensor):
            raise DheadsError(f"the released checkpoint holds two different copies of {plain}")
        ours[name] = tensor
    return ours


def _rename(module: str) -> str:
    """Our name of a module of the released network."""
    if module in _TOPS:
        return _TOPS[module]
    match = _BLOCK.fullmatch(module)
    if match is None or match[5] not in _PARTS:
        raise DheadsError(f"{module} is no part of a released Diffused Heads network")
    side, block, middle, position, part = match.groups()
    is_attention = part in {"norm", "qkv", "proj_out"}
    kind = "attn" if is_attention else "up" if side == "output" and position != "0" else "res"
    if middle:  # residual block, attention, residual block
        return f"middle.{int(position) // 2}.{kind}.{_PARTS[part]}"
    layer = f"down.{int(block) - 1}" if side == "input" else f"up.{block}"  # input block 0 is the stem
    return f"{layer}.{kind}.{_PARTS[part]}"


# --- Configuration


def config_from_released(args: dict[str, Any]) -> Config:
    """The configuration of a released network, from its arguments by the released code's names."""
    return Config(
        name="released",
        network=NetworkConfig(
            image_size=args["image_size"],
            model_channels=args["model_channels"],
            channel_mult=tuple(args["channel_mult"]),
            num_res_blocks=args["num_res_blocks"],
            attn_resolutions=tuple(args["attention_resolutions"]),
            head_channels=args["num_head_channels"],
            dropout=args["dropout"],
            # exp(-ln(1e4) i / (2 C)) for i < C/2 is a period of 1e4^(1/4).
            max_period=10.0,
            learned_variance=args["out_channels"] == 2 * args["in_channels"],
        ),
        diffusion=DiffusionConfig(),
        conditioning=ConditioningConfig(
            motion_frames=args["n_motion_frames"],
            audio_context=args["n_audio_motion_embs"],
            speech_encoder="diffused-heads",
            speech_dim=args["model_channels"],  # the released code supports this width only
            grayscale_motion=args["grayscale_motion"],
        ),
        alignment=preset("crema").alignment,
    )
