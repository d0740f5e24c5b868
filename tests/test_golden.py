"""Equivalence with the authors' released network and diffusion code, on numbers that it computed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dheads import diffusion
from dheads.conditioning import Condition, Cues
from dheads.config import Config
from dheads.errors import DheadsError
from dheads.extensions.network import ExtendedUNet
from dheads.reference import audio_cues, reference_frames
from dheads.weights.released import config_from_released, from_released

NETS = ["attn_low", "middle"]


@dataclass
class Golden:
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def config(self, net: str) -> Config:
        return config_from_released(json.loads(self.metadata[f"{net}.config"]))

    def unet(self, net: str, state: dict[str, Tensor]) -> ExtendedUNet:
        unet = ExtendedUNet(self.config(net))
        unet.load_state_dict(from_released(state))
        return unet.eval()


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    with safe_open(shared / "golden" / "official_unet_and_diffusion.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return Golden({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, file.metadata())


def doubled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The training branch's Lightning form: every name twice, among other things."""
    twice = {f"unet.{name}": tensor for name, tensor in state.items()}
    twice |= {f"diffusion.nn_backbone.{name}": tensor.clone() for name, tensor in state.items()}
    return {**twice, "diffusion.beta": torch.zeros(1000)}


@pytest.mark.parametrize("form", ["plain", "doubled"])
@pytest.mark.parametrize("net", NETS)
def test_forward_equals_the_released_networks(golden: Golden, net: str, form: str) -> None:
    state = golden.under(f"{net}.state.")
    unet = golden.unet(net, state if form == "plain" else doubled(state))
    io = golden.under(f"{net}.io.")
    channels = 1 if golden.config(net).conditioning.grayscale_motion else 3
    # Stored as the network saw them, two frames on channels; a gray picture is its own grayscale.
    motion = io["motion_frames"].unflatten(1, (2, channels)).expand(-1, -1, 3, -1, -1)
    condition = Condition(io["identity"], motion, Cues(io["audio_window"]))
    with torch.no_grad():
        output = unet(io["x_t"], io["t"], condition)
    ours = torch.cat([output.prediction, output.var_frac], dim=1)
    torch.testing.assert_close(ours, io["output"], rtol=0, atol=1e-4)


def test_every_weight_of_the_network_comes_from_the_released_state(golden: Golden) -> None:
    state = golden.under("attn_low.state.")
    renamed = from_released(state)
    assert len(renamed) == len(state)
    assert set(renamed) == set(ExtendedUNet(golden.config("attn_low")).state_dict())


def test_copies_that_differ_are_refused(golden: Golden) -> None:
    state = doubled(golden.under("middle.state."))
    state["unet.out.2.bias"] = state["unet.out.2.bias"] + 1
    with pytest.raises(DheadsError, match=r"two different copies of out\.2\.bias"):
        from_released(state)


@pytest.mark.parametrize("name", ["conv1.weight", "input_blocks.3.0.mystery.weight", "input_blocks.x.0.norm.bias"])
def test_foreign_names_are_refused(name: str) -> None:
    with pytest.raises(DheadsError, match="no part of a released Diffused Heads network"):
        from_released({name: torch.zeros(1)})


def test_closed_loop_equals_the_released_sampler(golden: Golden) -> None:
    """Four frames, eight respaced steps each: the reference's loop, with the paper's network."""
    config, unet = golden.config("attn_low"), golden.unet("attn_low", golden.under("attn_low.state."))
    given = golden.under("sample.")
    full = diffusion.cosine_schedule()
    schedule = diffusion.respaced(full, 8)
    assert schedule.timestep_map.tolist() == golden.tensors["diffusion.respaced_8.timesteps"].tolist()
    cues = audio_cues(given["audio_embeddings"][0], config.conditioning.audio_context)[:4]
    # Of each frame x_T, then the noise of step 7 first, and none after step 0.
    noise = (z for k in range(4) for z in [given["x_T"][:, k], *given["noise_frame_step"][k].flip(0)[:-1]])
    frames = list(reference_frames(unet, given["identity"], cues, schedule, noise))
    assert len(frames) == 4
    for k, x_0 in enumerate(frames):
        torch.testing.assert_close(x_0, given["frames"][:, k], rtol=0, atol=1e-2)
