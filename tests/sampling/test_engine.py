"""The engine computes what the network computes, with less work."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dheads.conditioning import Cues
from dheads.config import Config, override, preset
from dheads.denoiser import Denoiser, training_schedule
from dheads.diffusion import SOLVERS, Denoise, Denoised, respaced
from dheads.extensions.codes import codes_of
from dheads.extensions.motion import MotionCondition, condition_with
from dheads.extensions.network import ExtendedUNet
from dheads.model import ResBlock
from dheads.sampling.engine import Engine, Inputs
from dheads.system.devices import COMPILE_OPTIONS, best_dtype

TINY = preset("tiny")
PAPER = override(
    TINY,
    {
        "network": {"learned_variance": True, "attn_resolutions": [16]},
        "diffusion": {"prediction": "eps"},
        "conditioning": {"grayscale_motion": True},
        "extensions": {
            "copying": {"gates": False},
            "motion": {"noise": 0.0, "hide_mouth": False},
            "codes": {"lips": None},
        },
    },
)
PATCHES = override(TINY, {"extensions": {"patches": {"size": 2}}, "diffusion": {"prediction": "x_0"}})
DETAIL = override(
    PATCHES, {"extensions": {"patches": {"size": 4, "detail_channels": 8}}, "network": {"learned_variance": True}}
)
WARP = override(
    DETAIL,
    {"extensions": {"copying": {"gates": False}, "warp": {"flow": True}, "codes": {"pose": {"context": 1}}}},
)
CONFIGS = {"tiny": TINY, "paper": PAPER, "patches": PATCHES, "detail": DETAIL, "warp": WARP}


def lively(config: Config, std: float = 0.05) -> ExtendedUNet:
    """A network that depends on everything it is given, as a zero-initialised one does not."""
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


def inputs(config: Config, batch: int, noises: int = 1) -> Inputs:
    size, cond, tables = config.network.image_size, config.conditioning, config.extensions.codes
    motion = (batch, cond.motion_frames, 3, size, size)
    windows = {code.name: (2 * tables[code.name].context + 1, code.dims) for code in codes_of(config)}
    return Inputs(
        torch.rand(batch, 3, size, size) * 2 - 1,
        torch.rand(motion) * 2 - 1,
        Cues(
            torch.randn(batch, 2 * cond.audio_context + 1, cond.speech_dim),
            {name: (0.1 if name == "pose" else 1.0) * torch.randn(batch, *shape) for name, shape in windows.items()},
        ),
        torch.randn(motion) if config.extensions.motion.noise else None,
        torch.randn(batch, noises, 3, size, size),
    )


def condition_of(config: Config, given: Inputs, level: float) -> MotionCondition:
    levels = given.identity.new_full((len(given.identity),), level) if config.extensions.motion.noise else None
    return condition_with(config, given.identity, given.motion_frames, given.cues, levels, given.motion_eps)


def sampled(config: Config, extensions: dict[str, Any] | None = None, **sampling: object) -> Config:
    """The configuration with other values in its sections sampling and extensions."""
    return override(config, {"sampling": sampling, "extensions": extensions or {}})


@torch.no_grad()
def plain(unet: ExtendedUNet, given: Inputs, config: Config) -> Tensor:
    """One frame, with everything computed again at every step."""
    denoiser, condition = Denoiser(unet), condition_of(unet.config, given, config.extensions.motion.sampling_noise)
    x_T, *rest = given.noise.unbind(1)
    noise = iter(rest)

    def denoise(x_t: Tensor, t: int) -> Denoised:
        return denoiser(x_t, torch.full((len(x_t),), t, device=x_t.device), condition)[0]

    schedule = respaced(denoiser.schedule, config.sampling.steps, config.sampling.spacing)
    return SOLVERS[config.sampling.solver](denoise, schedule, x_T, lambda: next(noise)).clamp(-1, 1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("batch", "level"), [(1, 0.2), (3, 0.0)])
def test_the_engine_computes_what_the_network_does(name: str, batch: int, level: float) -> None:
    config = CONFIGS[name]
    unet = lively(config)
    engine = Engine(unet, sampled(config, {"motion": {"sampling_noise": level}}, steps=4), torch.float32)
    denoiser = Denoiser(unet)
    for _ in range(2):  # two frames
        condition = condition_of(config, inputs(config, batch), level)
        denoise = engine.frame(condition)
        for step in reversed(engine.schedule.timestep_map.tolist()):
            x_t = torch.randn(batch, 3, 32, 32)
            compare(denoise(x_t, step), denoiser(x_t, torch.full((batch,), step), condition)[0], 1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_frame_is_that_of_the_plain_computation(name: str, solver: str) -> None:
    config = sampled(CONFIGS[name], {"motion": {"sampling_noise": 0.1}}, steps=4, solver=solver)
    unet = lively(config)
    engine = Engine(unet, config, torch.float32)
    assert engine.noises == (4 if solver == "ddpm" else 1)
    given = inputs(config, 2, engine.noises)
    ours = engine.generate(given)
    torch.testing.assert_close(ours, plain(unet, given, config), rtol=1e-3, atol=1e-3)
    assert ours.abs().max() <= 1


def test_half_precision_is_near_full() -> None:
    unet, condition = lively(PATCHES), condition_of(PATCHES, inputs(PATCHES, 1), 0.0)
    config = sampled(PATCHES, steps=2, solver="ddpm")
    full, half = (Engine(unet, config, dtype).frame(condition) for dtype in (torch.float32, torch.bfloat16))
    x_t = torch.randn(1, 3, 32, 32)
    compare(half(x_t, 999), full(x_t, 999), 0.03)


def test_time_is_computed_once_and_audio_once_a_frame() -> None:
    unet = lively(TINY)
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
    calls: list[str] = []
    for block in blocks:
        block.time_affine.register_forward_hook(lambda *_: calls.append("time"))
        block.audio_affine.register_forward_hook(lambda *_: calls.append("audio"))
    engine = Engine(unet, sampled(TINY, steps=5), torch.float32)
    for _ in range(3):
        engine.generate(inputs(TINY, 1))
    assert calls.count("time") == len(blocks)
    assert calls.count("audio") == 3 * len(blocks)


# --- Guidance, and frames that start from the last one


def test_guidance_goes_beyond_the_picture_without_sound() -> None:
    unet, given = lively(TINY), inputs(TINY, 2)
    one = Engine(unet, sampled(TINY, steps=1, solver="ddim"), torch.float32)
    heard, unheard = one.generate(given), one.generate(without_sound(given))
    for guidance in (0.0, 0.5, 1.5):
        config = sampled(TINY, {"sound": {"guidance": guidance}}, steps=1, solver="ddim")
        guided = Engine(unet, config, torch.float32)
        # Before the last clamp: these pictures lie well inside [-1, 1] or are cut at it in all three.
        wanted = unheard + guidance * (heard - unheard)
        inside = (heard.abs() < 1) & (unheard.abs() < 1) & (wanted.abs() < 1)
        assert inside.float().mean() > 0.1
        torch.testing.assert_close(guided.generate(given)[inside], wanted[inside], rtol=1e-3, atol=1e-3)


def without_sound(given: Inputs) -> Inputs:
    """The same without embeddings and without the lip code; eyes still blink."""
    codes = {name: torch.zeros_like(code) if name == "lips" else code for name, code in given.cues.codes.items()}
    return dataclasses.replace(given, cues=Cues(torch.zeros_like(given.cues.audio_window), codes))


def test_a_warm_frame_starts_from_the_last_one_noised() -> None:
    unet, given = lively(TINY), inputs(TINY, 2)
    engine = Recorder(unet, sampled(TINY, {"noise": {"warm_steps": 2}}, steps=6, solver="ddim"))
    engine.generate(given, first=True)
    assert [t for t, _ in engine.calls] == [999, 799, 599, 400, 200, 0]
    engine.calls.clear()
    engine.generate(given, first=False)
    assert [t for t, _ in engine.calls] == [200, 0]
    ab = training_schedule(TINY.diffusion).alpha_bar[200].float()
    start = ab.sqrt() * given.motion_frames[:, -1] + (1 - ab).sqrt() * given.noise[:, 0]
    torch.testing.assert_close(engine.calls[0][1], start)


@pytest.mark.parametrize(("steps", "warm"), [(6, 0), (4, 4), (4, 9)])
def test_without_fewer_warm_steps_every_frame_starts_from_noise(steps: int, warm: int) -> None:
    engine = Engine(lively(TINY), sampled(TINY, {"noise": {"warm_steps": warm}}, steps=steps), torch.float32)
    given = inputs(TINY, 1)
    assert torch.equal(engine.generate(given, first=False), engine.generate(given, first=True))


class Recorder(Engine):
    """Records every call of the denoiser."""

    def __init__(self, unet: ExtendedUNet, config: Config) -> None:
        super().__init__(unet, config, torch.float32)
        self.calls: list[tuple[int, Tensor]] = []

    def frame(self, condition: MotionCondition) -> Denoise:
        denoise = super().frame(condition)

        def recorded(x_t: Tensor, t: int) -> Denoised:
            self.calls.append((t, x_t))
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


# Every network with the solver that takes the most from earlier steps, and every solver.
WAITING = [*((name, "dpm++2m") for name in CONFIGS), ("paper", "ddpm"), ("paper", "ddim"), ("tiny", "ddpm")]


@pytest.mark.parametrize(("name", "solver"), WAITING)
def test_nothing_inside_a_frame_waits_for_the_device(name: str, solver: str) -> None:
    """On "meta" nothing has a value: whatever depends on one fails, as recording a CUDA graph would."""
    for guidance, warm in ((2.0, 0), (1.0, 2)):  # with and without either
        changes = {"sound": {"guidance": guidance}, "noise": {"warm_steps": warm}}
        config = sampled(CONFIGS[name], changes, steps=3, solver=solver)
        engine = Engine(lively(config).to("meta"), config, torch.bfloat16)
        given = on("meta", inputs(config, 2, engine.noises))
        with Waits():
            assert engine.generate(given, first=not warm).shape == (2, 3, 32, 32)


def on(device: str | torch.device, given: Inputs) -> Inputs:
    return given.map(lambda value: value.to(device))


class Tape(TorchDispatchMode):
    """A CUDA graph on the CPU: the recorded operations, without the Python that called them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable, tuple, dict, object]] = []

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Repeat the operations on the present values of outer tensors; all results are written in place."""
        made: dict[int, Tensor] = {}
        places: list[tuple[Tensor, Tensor]] = []

        def now(tensor: Tensor) -> Tensor:
            return made.get(id(tensor), tensor)

        for func, args, kwargs, recorded in self.operations:
            args, kwargs = tree_map_only(Tensor, now, (args, kwargs))
            result = func(*args, **kwargs)
            pairs = zip(tree_leaves(recorded), tree_leaves(result), strict=True)
            tensors = [(old, new) for old, new in pairs if isinstance(old, Tensor)]
            made.update((id(old), new) for old, new in tensors)
            # Expanded tensors are views of others.
            places += [
                pair for pair in tensors if pair[0].data_ptr() != pair[1].data_ptr() and 0 not in pair[0].stride()
            ]
        for old, new in places:
            old.copy_(new)


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
    config = sampled(CONFIGS[name], steps=3, solver="ddpm")
    unet = lively(config)
    engine, eager = Engine(unet, config, torch.float32), Engine(unet, config, torch.float32)
    engine.records = True
    frames = [inputs(config, 2, engine.noises) for _ in range(4)]
    kept = [(engine.generate(given), engine.taken) for given in frames]
    for given, (ours, taken) in zip(frames, kept, strict=True):
        torch.testing.assert_close(ours, eager.generate(given), rtol=1e-5, atol=1e-5)
        assert (taken is None) == (eager.taken is None) == (not config.extensions.warp.flow)
        if taken is not None and eager.taken is not None:
            torch.testing.assert_close((taken.grid, taken.share), (eager.taken.grid, eager.taken.share))
    assert len(tapes) == 1, "the first frame warms up, the second is recorded, all later ones are replayed"
    for _ in range(2):
        engine.generate(inputs(config, 1, engine.noises))
    assert len(tapes) == 2, "another batch size is another graph"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_frame_replays_with_renewed_weights(dtype: torch.dtype, tapes: list[Tape]) -> None:
    unet, config = lively(DETAIL), sampled(DETAIL, steps=3)
    engine, given = Engine(unet, config, dtype), inputs(DETAIL, 2)
    engine.records = True
    before = [engine.generate(given) for _ in range(3)][-1]
    for parameter in unet.parameters():
        parameter.mul_(1.2)
    engine.renew()
    wanted = Engine(unet, config, dtype).generate(given)
    torch.testing.assert_close(engine.generate(given), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=1e-3)
    assert len(tapes) == 1


def test_the_network_compiles_as_one_whole() -> None:
    """No part of it falls back to Python, which would cost what compiling saves."""
    unet, given = lively(TINY), inputs(TINY, 1)
    engine = Engine(unet, sampled(TINY, steps=2), torch.float32)
    wanted = engine.generate(given)
    engine._denoise = torch.compile(engine._denoise, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(engine.generate(given), wanted)


@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="builds machine code")
def test_compiled_bfloat16_survives_a_change_of_layout() -> None:
    """GCC 12 gave NaN here: for the sum of two channels-last pictures and a contiguous one."""
    pictures = [torch.randn(4, 128, 8, 8, generator=torch.manual_seed(seed)).bfloat16() for seed in range(3)]
    first, second = (picture.contiguous(memory_format=torch.channels_last) for picture in pictures[:2])
    # Headers that are compiled ahead only pay for themselves where there is much to compile.
    options = COMPILE_OPTIONS | {"cpp_cache_precompile_headers": False}
    total = torch.compile(lambda a, b, c: c + a + b, dynamic=False, options=options)(first, second, pictures[2])
    wanted = sum(picture.float() for picture in pictures)
    torch.testing.assert_close(total.float(), wanted, rtol=2**-7, atol=2**-7)


# --- What it leaves alone, and what it chooses


def test_the_given_network_stays_as_it_is() -> None:
    unet = lively(TINY)
    before: dict[str, Tensor] = {name: value.clone() for name, value in unet.state_dict().items()}
    Engine(unet, sampled(TINY, steps=2, solver="ddpm"), torch.bfloat16).generate(inputs(TINY, 1, 2))
    after = unet.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("can", "wanted"), [({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32), ({}, torch.float32)]
)
def test_a_processor_computes_in_its_fastest_type(
    monkeypatch: pytest.MonkeyPatch, can: dict[str, bool], wanted: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    assert best_dtype(torch.device("cpu")) == wanted
