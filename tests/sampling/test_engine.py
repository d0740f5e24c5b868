"""The engine computes what the network computes, with less work."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dheads.conditioning import Condition
from dheads.config import Config, SamplingConfig, build, override, preset
from dheads.denoiser import Denoiser, training_schedule
from dheads.diffusion import SOLVERS, Denoise, Denoised, respaced
from dheads.extensions.network import ExtendedUNet
from dheads.model import ResBlock
from dheads.sampling.engine import Engine, Inputs
from dheads.system.devices import COMPILE_OPTIONS, best_dtype

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
DETAIL = override(PATCHES, {"model": {"patch_size": 4, "detail_channels": 8, "learned_variance": True}})
CONFIGS = {"tiny": TINY, "paper": PAPER, "patches": PATCHES, "detail": DETAIL}


def lively(config: Config, std: float = 0.05) -> ExtendedUNet:
    """A network that depends on all it is told, as no zero-initialised one does."""
    unet = ExtendedUNet(config).eval().requires_grad_(False)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=std)
    return unet


def compare(ours: Denoised, plain: Denoised, tolerance: float) -> None:
    scale = max(1.0, float(plain.x_0.abs().max()))  # at the last timestep eps says little about x_0
    torch.testing.assert_close(ours.x_0, plain.x_0, rtol=tolerance, atol=tolerance * scale)
    assert ours.x_0.dtype == torch.float32
    assert (ours.var_frac is None) is (plain.var_frac is None)
    if ours.var_frac is not None:
        torch.testing.assert_close(ours.var_frac, plain.var_frac, rtol=tolerance, atol=tolerance)


def inputs(config: Config, batch: int, draws: int = 1) -> Inputs:
    size, given = config.network.image_size, config.conditioning
    motion = (batch, given.motion_frames, 3, size, size)
    return Inputs(
        torch.rand(batch, 3, size, size) * 2 - 1,
        torch.rand(motion) * 2 - 1,
        torch.randn(batch, 2 * given.audio_context + 1, given.speech_dim),
        torch.randn(batch, 2 * given.lip_context + 1, given.lip_dims) if given.lip_dims else None,
        torch.randn(motion) if given.motion_noise else None,
        torch.randn(batch, draws, 3, size, size),
        torch.randn(batch, 2 * given.eye_context + 1, given.eye_dims) if given.eye_dims else None,
    )


def condition_of(config: Config, given: Inputs, level: float) -> Condition:
    told = given.identity.new_full((len(given.identity),), level) if config.extensions.motion.noise else None
    return build(
        config,
        given.identity,
        given.motion_frames,
        given.audio_window,
        given.lip_window,
        told,
        given.motion_eps,
        eye_window=given.eye_window,
    )


def sampling(config: Config, **changes: object) -> SamplingConfig:
    return dataclasses.replace(config.sampling, **changes)


@torch.no_grad()
def plain(unet: ExtendedUNet, given: Inputs, told: SamplingConfig) -> Tensor:
    """One frame the plain way: everything anew at every step."""
    denoiser, condition = Denoiser(unet), condition_of(unet.config, given, told.motion_noise)
    x_T, *rest = given.noise.unbind(1)
    noise = iter(rest)

    def denoise(x_t: Tensor, t: int) -> Denoised:
        return denoiser(x_t, torch.full((len(x_t),), t, device=x_t.device), condition)[0]

    schedule = respaced(denoiser.schedule, told.steps, told.spacing)
    return SOLVERS[told.solver](denoise, schedule, x_T, lambda: next(noise)).clamp(-1, 1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("level", [0.0, 0.2])
def test_it_says_what_the_network_says(name: str, batch: int, level: float) -> None:
    config = CONFIGS[name]
    unet = lively(config)
    engine, denoiser = Engine(unet, sampling(config, steps=4, motion_noise=level), torch.float32), Denoiser(unet)
    for _ in range(2):  # two frames
        condition = condition_of(config, inputs(config, batch), level)
        denoise = engine.frame(condition)
        for step in reversed(engine.schedule.timestep_map.tolist()):
            x_t = torch.randn(batch, 3, 32, 32)
            compare(denoise(x_t, step), denoiser(x_t, torch.full((batch,), step), condition)[0], 1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_frame_is_what_the_plain_way_makes(name: str, solver: str) -> None:
    config = CONFIGS[name]
    unet, told = lively(config), sampling(config, steps=4, solver=solver, motion_noise=0.1)
    engine = Engine(unet, told, torch.float32)
    assert engine.noises == (4 if solver == "ddpm" else 1)
    given = inputs(config, 2, engine.noises)
    ours = engine.generate(given)
    torch.testing.assert_close(ours, plain(unet, given, told), rtol=1e-3, atol=1e-3)
    assert ours.abs().max() <= 1


def test_half_precision_is_near_full() -> None:
    unet, condition = lively(PATCHES), condition_of(PATCHES, inputs(PATCHES, 1), 0.0)
    full, half = (Engine(unet, SamplingConfig(2), dtype).frame(condition) for dtype in (torch.float32, torch.bfloat16))
    x_t = torch.randn(1, 3, 32, 32)
    compare(half(x_t, 999), full(x_t, 999), 0.03)


def test_time_is_computed_once_and_audio_once_a_frame() -> None:
    unet = lively(TINY)
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
    asked: list[str] = []
    for block in blocks:
        block.time_affine.register_forward_hook(lambda *given: asked.append("time"))
        block.audio_affine.register_forward_hook(lambda *given: asked.append("audio"))
    engine = Engine(unet, sampling(TINY, steps=5), torch.float32)
    for _ in range(3):
        engine.generate(inputs(TINY, 1))
    assert asked.count("time") == len(blocks)
    assert asked.count("audio") == 3 * len(blocks)


# --- Guidance, and frames that start from the last one


def test_guidance_goes_beyond_what_is_drawn_without_sound() -> None:
    unet, given = lively(TINY), inputs(TINY, 2)
    one = Engine(unet, sampling(TINY, steps=1, solver="ddim"), torch.float32)
    hearing = one.draw(given)
    silent = dataclasses.replace(
        given, audio_window=torch.zeros_like(given.audio_window), lip_window=torch.zeros_like(given.lip_window)
    )
    deaf = one.draw(silent)
    for guidance in (0.0, 0.5, 1.5):
        guided = Engine(unet, sampling(TINY, steps=1, solver="ddim", guidance=guidance), torch.float32)
        # Before the last clamp: these pictures lie well inside [-1, 1] or are cut at it in all three.
        wanted = deaf + guidance * (hearing - deaf)
        inside = (hearing.abs() < 1) & (deaf.abs() < 1) & (wanted.abs() < 1)
        assert inside.float().mean() > 0.1
        torch.testing.assert_close(guided.draw(given)[inside], wanted[inside], rtol=1e-3, atol=1e-3)


def test_a_warm_frame_starts_from_the_last_one_noised() -> None:
    unet, given = lively(TINY), inputs(TINY, 2)
    engine = Recorder(unet, sampling(TINY, steps=6, warm_steps=2, solver="ddim"))
    engine.generate(given, first=True)
    assert [t for t, _ in engine.asked] == [999, 799, 599, 400, 200, 0]
    engine.asked.clear()
    engine.generate(given, first=False)
    assert [t for t, _ in engine.asked] == [200, 0]
    ab = training_schedule(TINY.diffusion).alpha_bar[200].float()
    start = ab.sqrt() * given.motion_frames[:, -1] + (1 - ab).sqrt() * given.noise[:, 0]
    torch.testing.assert_close(engine.asked[0][1], start)


@pytest.mark.parametrize(("steps", "warm"), [(6, 0), (4, 4), (4, 9)])
def test_without_fewer_warm_steps_every_frame_starts_from_noise(steps: int, warm: int) -> None:
    engine = Engine(lively(TINY), sampling(TINY, steps=steps, warm_steps=warm), torch.float32)
    given = inputs(TINY, 1)
    assert torch.equal(engine.generate(given, first=False), engine.generate(given, first=True))


class Recorder(Engine):
    """Remembers what it was asked."""

    def __init__(self, unet: ExtendedUNet, told: SamplingConfig) -> None:
        super().__init__(unet, told, torch.float32)
        self.asked: list[tuple[int, Tensor]] = []

    def frame(self, condition: Condition) -> Denoise:
        denoise = super().frame(condition)

        def recorded(x_t: Tensor, t: int) -> Denoised:
            self.asked.append((t, x_t))
            return denoise(x_t, t)

        return recorded


# --- A frame as one graph


class Waits(TorchDispatchMode):
    """Fails where the host would wait for the device: a number or a tensor that comes from it, or one sent to it."""

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        assert "_local_scalar_dense" not in str(func), "a number was read from the device"
        if isinstance(result, Tensor) and "copy" in str(func):
            for value in args:
                if isinstance(value, Tensor) and value.dim():
                    assert value.device == result.device, f"{func}: from {value.device} to {result.device}"
        return result


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_inside_a_frame_waits_for_the_device(name: str, solver: str) -> None:
    """On "meta" nothing has a value: whatever depends on one fails, as recording a CUDA graph would."""
    config = CONFIGS[name]
    for guidance, warm in ((1.0, 0), (2.0, 0), (1.0, 2)):
        told = sampling(config, steps=3, solver=solver, guidance=guidance, warm_steps=warm)
        engine = Engine(lively(config).to("meta"), told, torch.bfloat16)
        given = on("meta", inputs(config, 2, engine.noises))
        with Waits():
            assert engine.generate(given, first=not warm).shape == (2, 3, 32, 32)


def on(device: str | torch.device, given: Inputs) -> Inputs:
    return Inputs(*(None if value is None else value.to(device) for value in values_of(given)))


def values_of(given: Inputs) -> list[Tensor | None]:
    return [getattr(given, field.name) for field in dataclasses.fields(given)]


class Tape(TorchDispatchMode):
    """A CUDA graph on the CPU: the operations that were recorded, without the Python that asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable, tuple, dict, object]] = []

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """The same on what the tensors from outside hold now; the last result is written where it was."""
        made: dict[int, Tensor] = {}

        def now(tensor: Tensor) -> Tensor:
            return made.get(id(tensor), tensor)

        for func, args, kwargs, recorded in self.operations:
            args, kwargs = tree_map_only(Tensor, now, (args, kwargs))
            result = func(*args, **kwargs)
            pairs = zip(tree_leaves(recorded), tree_leaves(result), strict=True)
            made.update((id(old), new) for old, new in pairs if isinstance(old, Tensor))
        recorded.copy_(result)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Lets the engine record on the CPU."""
    made: list[Tape] = []

    @contextlib.contextmanager
    def record(tape: Tape, capture_error_mode: str) -> Iterator[None]:
        made.append(tape)
        with tape:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recorded_frame_replays_with_new_inputs(name: str, tapes: list[Tape]) -> None:
    config = CONFIGS[name]
    unet, told = lively(config), sampling(config, steps=3, solver="ddpm")
    engine, eager = Engine(unet, told, torch.float32), Engine(unet, told, torch.float32)
    engine.records = True
    frames = [inputs(config, 2, engine.noises) for _ in range(4)]
    kept = [engine.generate(given) for given in frames]
    for given, ours in zip(frames, kept, strict=True):
        torch.testing.assert_close(ours, eager.draw(given), rtol=1e-5, atol=1e-5)
    assert len(tapes) == 1, "the first frame warms up, the second is recorded, all later ones are replayed"
    for _ in range(2):
        engine.generate(inputs(config, 1, engine.noises))
    assert len(tapes) == 2, "another batch size is another graph"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_frame_replays_with_renewed_weights(dtype: torch.dtype, tapes: list[Tape]) -> None:
    unet, told = lively(DETAIL), sampling(DETAIL, steps=3)
    engine, given = Engine(unet, told, dtype), inputs(DETAIL, 2)
    engine.records = True
    before = [engine.generate(given) for _ in range(3)][-1]
    for parameter in unet.parameters():
        parameter.mul_(1.2)
    engine.renew()
    wanted = Engine(unet, told, dtype).generate(given)
    torch.testing.assert_close(engine.generate(given), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=1e-3)
    assert len(tapes) == 1


def test_the_network_compiles_as_one_whole() -> None:
    """No part of it falls back to Python, which would cost what compiling saves."""
    unet, given = lively(TINY), inputs(TINY, 1)
    engine = Engine(unet, sampling(TINY, steps=2), torch.float32)
    wanted = engine.generate(given)
    engine._denoise = torch.compile(engine._denoise, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(engine.generate(given), wanted)


@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="builds machine code")
def test_compiled_bfloat16_survives_a_change_of_layout() -> None:
    """GCC 12 gave NaN here: the sum of two pictures by channels last and one that is contiguous."""
    pictures = [torch.randn(4, 128, 8, 8, generator=torch.manual_seed(seed)).bfloat16() for seed in range(3)]
    first, second = (picture.contiguous(memory_format=torch.channels_last) for picture in pictures[:2])
    total = torch.compile(lambda a, b, c: c + a + b, dynamic=False, options=COMPILE_OPTIONS)(first, second, pictures[2])
    wanted = sum(picture.float() for picture in pictures)
    torch.testing.assert_close(total.float(), wanted, rtol=2**-7, atol=2**-7)


# --- What it leaves alone, and what it chooses


def test_the_given_network_stays_as_it_is() -> None:
    unet = lively(TINY)
    before: dict[str, Tensor] = {name: value.clone() for name, value in unet.state_dict().items()}
    Engine(unet, SamplingConfig(2), torch.bfloat16).generate(inputs(TINY, 1, 2))
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
