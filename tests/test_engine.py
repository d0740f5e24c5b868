"""The engine computes what the network computes, with less work."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from dheads.conditioning import Condition, build
from dheads.config import Config, override, preset
from dheads.denoiser import Denoiser
from dheads.diffusion import Denoised
from dheads.engine import Engine, best_dtype
from dheads.model import ResBlock, UNet

TINY = preset("tiny")
PAPER = override(
    TINY,
    {
        "model": {"learned_variance": True, "copy_gates": False, "attn_resolutions": [16]},
        "diffusion": {"prediction": "eps"},
        "conditioning": {"lip_dims": 0, "motion_noise": 0.0, "hide_motion_mouth": False, "grayscale_motion": True},
    },
)
PATCHES = override(TINY, {"model": {"patch_size": 2}, "diffusion": {"prediction": "x_0"}})
CONFIGS = {"tiny": TINY, "paper": PAPER, "patches": PATCHES}


def lively(config: Config) -> UNet:
    """A network that depends on all it is told, as no zero-initialised one does."""
    unet = UNet(config).eval().requires_grad_(False)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.05)
    return unet


def told(config: Config, batch: int) -> Condition:
    size, given = config.model.image_size, config.conditioning
    return build(
        config,
        torch.rand(batch, 3, size, size) * 2 - 1,
        torch.rand(batch, given.motion_frames, 3, size, size) * 2 - 1,
        torch.randn(batch, 2 * given.audio_context + 1, given.speech_dim),
        torch.randn(batch, 2 * given.lip_context + 1, given.lip_dims) if given.lip_dims else None,
        torch.full((batch,), 0.2) if given.motion_noise else None,
        torch.randn(batch, given.motion_frames, 3, size, size),
    )


def compare(ours: Denoised, plain: Denoised, tolerance: float) -> None:
    scale = max(1.0, float(plain.x_0.abs().max()))  # at the last timestep eps says little about x_0
    torch.testing.assert_close(ours.x_0, plain.x_0, rtol=tolerance, atol=tolerance * scale)
    assert ours.x_0.dtype == torch.float32
    assert (ours.var_frac is None) is (plain.var_frac is None)
    if ours.var_frac is not None:
        torch.testing.assert_close(ours.var_frac, plain.var_frac, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 3])
def test_it_says_what_the_network_says(name: str, batch: int) -> None:
    config = CONFIGS[name]
    unet = lively(config)
    engine, plain = Engine(unet, 4, torch.float32), Denoiser(unet)
    for _ in range(2):  # two frames
        condition = told(config, batch)
        denoise = engine.frame(condition)
        for step in reversed(engine.schedule.timestep_map.tolist()):
            x_t, t = torch.randn(batch, 3, 32, 32), torch.full((batch,), step)
            compare(denoise(x_t, t), plain(x_t, t, condition)[0], 1e-4)


def test_half_precision_is_near_full() -> None:
    unet, condition = lively(PATCHES), told(PATCHES, 1)
    full, half = (Engine(unet, 2, dtype).frame(condition) for dtype in (torch.float32, torch.bfloat16))
    x_t, t = torch.randn(1, 3, 32, 32), torch.tensor([999])
    compare(half(x_t, t), full(x_t, t), 0.03)


def test_a_clips_frames_do_not_depend_on_its_neighbours_in_the_batch() -> None:
    unet, both = lively(TINY), told(TINY, 2)
    first = Condition(
        *(
            value if value is None or field.name == "mouth_mask" else value[:1]
            for field in dataclasses.fields(both)
            for value in [getattr(both, field.name)]
        )
    )
    engine = Engine(unet, 2, torch.float32)
    x_t, t = torch.randn(2, 3, 32, 32), torch.tensor([999, 999])
    together, alone = engine.frame(both)(x_t, t).x_0[:1], engine.frame(first)(x_t[:1], t[:1]).x_0
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_another_level_of_noise_is_heard() -> None:
    """The steps' scales and shifts are kept from frame to frame, but not over a change of what they depend on."""
    unet, condition = lively(TINY), told(TINY, 1)
    louder = dataclasses.replace(condition, motion_noise=torch.tensor([0.3]))
    engine, plain = Engine(unet, 2, torch.float32), Denoiser(unet)
    x_t, t = torch.randn(1, 3, 32, 32), torch.tensor([0])
    for given in (condition, louder, condition):
        compare(engine.frame(given)(x_t, t), plain(x_t, t, given)[0], 1e-4)


def test_time_is_computed_once_a_video_and_audio_once_a_frame() -> None:
    unet = lively(TINY)
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
    asked: list[str] = []
    for block in blocks:
        block.time_affine.register_forward_hook(lambda *given: asked.append("time"))
        block.audio_affine.register_forward_hook(lambda *given: asked.append("audio"))
    engine = Engine(unet, 5, torch.float32)
    for _ in range(3):
        denoise = engine.frame(told(TINY, 1))
        for step in engine.schedule.timestep_map:
            denoise(torch.randn(1, 3, 32, 32), step[None])
    assert asked.count("time") == len(blocks)
    assert asked.count("audio") == 3 * len(blocks)


def test_the_given_network_stays_as_it_is() -> None:
    unet = lively(TINY)
    before: dict[str, Tensor] = {name: value.clone() for name, value in unet.state_dict().items()}
    Engine(unet, 2, torch.bfloat16)
    after = unet.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("can", "wanted"), [({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32), ({}, torch.float32)]
)
def test_a_processor_computes_in_what_it_is_fast_at(
    monkeypatch: pytest.MonkeyPatch, can: dict[str, bool], wanted: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    assert best_dtype(torch.device("cpu")) == wanted
