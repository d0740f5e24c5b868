"""How fast sampling is: the engine against the plain way of the same network, in one run.

    python benchmarks/sample_speed.py
    python benchmarks/sample_speed.py --clips 8      # also as many videos in lock-step
    python benchmarks/sample_speed.py --minutes 10   # also a long one: does it slow down, or fill the memory?
    python benchmarks/sample_speed.py --preset crema --device cuda --steps 8 --clips 16 --compile  # paper-size

The plain way is float32, eager, contiguous, with all conditioning computed again at every step. Two comparisons: at
equal steps and the same solver, with the largest difference of a pixel; and of the engine's default against ancestral
sampling in 100 steps, as in the released code. Turns alternate; medians are printed. Without
--preset it is the packaged network; with it random weights of that preset, which are as fast as trained ones.
Seconds to the first frame are those from a loaded network to its first picture, the first time in this process. The
peak of memory is the engine's, taken before the plain way is built; for CUDA that of tensors. The share of the peak
counts the network's own operations.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from tqdm import tqdm
from train_speed import machine, peak_flops_per_second

from dheads.conditioning import Cues
from dheads.config import FPS, Config, NoiseConfig, SamplingConfig, override, preset
from dheads.denoiser import Denoiser, training_schedule
from dheads.diffusion import Denoise, Denoised, respaced
from dheads.extensions.motion import MotionCondition
from dheads.extensions.network import ExtendedUNet
from dheads.media.pixels import to_unit
from dheads.reference import audio_cues, reference_frames
from dheads.sampling.engine import Engine
from dheads.sampling.lockstep import VideoSpec, in_lockstep
from dheads.sampling.talker import adjusted
from dheads.system.devices import resolve_device
from dheads.training.plan import plan
from dheads.weights.checkpoints import load_model


class Plain(Engine):
    """Samples as the engine does, with any solver and every extension, but by the network's own forward pass."""

    def __init__(self, unet: ExtendedUNet, config: Config) -> None:
        super().__init__(unet, config, torch.float32)
        self.records = False
        self._denoiser = Denoiser(unet)

    def frame(self, condition: MotionCondition) -> Denoise:
        def denoise(x_t: Tensor, t: int) -> Denoised:
            return self._denoiser(x_t, torch.full((len(x_t),), t, device=x_t.device), condition)[0]

        return denoise


def main(
    preset_name: Annotated[str | None, typer.Option("--preset", help="Random weights of this preset.")] = None,
    weights: Annotated[str, typer.Option(help="Else these.")] = "small",
    steps: Annotated[
        int | None, typer.Option(help="The weights' own by default; with --preset of DPM-Solver++ 2M.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Of a turn; the 100 plain steps get a tenth of them.")] = 20,
    rounds: int = 3,
    clips: Annotated[int, typer.Option(help="Also so many videos in lock-step.")] = 1,
    minutes: Annotated[float, typer.Option(help="Also one video of that length.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="The engine's network by torch.compile.")] = False,
    device: str = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one line of JSON.")] = False,
) -> None:
    """Measure the speed of sampling."""
    place = resolve_device(device)
    unet = random_network(preset_name).to(place) if preset_name else load_model(weights, place)[0]
    config = adjusted(unet.config, steps=steps, solver="dpm++2m" if preset_name else None)

    start = time.perf_counter()
    engine = Engine(unet, config, compiled=compiled)
    next(in_lockstep(engine, [video(unet, 1)]))
    first = time.perf_counter() - start
    turn(engine, frames)
    report = {
        "machine": f"{machine(place)}; torch {torch.__version__}, {torch.get_num_threads()} threads",
        "network": f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M, {unet.config.network.image_size} px",
        "steps": f"{config.sampling.steps} of {config.sampling.solver}",
        "way": f"{engine.dtype}{', compiled' if compiled else ''}",
        "seconds_to_first_frame": first,
        "peak_memory_mib": peak_memory(place),
        **against_the_plain_way(engine, frames, rounds),
    }
    if clips > 1:
        report |= together(engine, frames, rounds, clips)
    if minutes:
        report |= long_recording(engine, minutes)
    if as_json:
        print(json.dumps(report))
    else:
        print("\n".join(f"{k:<30} {v:.4g}" if isinstance(v, float) else f"{k:<30} {v}" for k, v in report.items()))


def against_the_plain_way(engine: Engine, frames: int, rounds: int) -> dict[str, float]:
    ways = {"ours": engine, "plain": Plain(engine.unet, engine.config)}
    speeds: dict[str, list[float]] = {name: [] for name in (*ways, "released")}
    pictures: dict[str, np.ndarray] = {}
    for _ in tqdm(range(rounds), desc="rounds", disable=not sys.stderr.isatty()):
        for name, way in ways.items():
            speed, pictures[name] = turn(way, frames)
            speeds[name].append(speed)
        speeds["released"].append(reference_speed(engine.unet, 100, max(1, frames // 10)))
    ours, plain, ancestral = (statistics.median(values) for values in speeds.values())
    difference = np.abs(pictures["ours"].astype(int) - pictures["plain"])
    return {
        "frames_per_second": ours,
        "plain_frames_per_second": plain,
        "released_frames_per_second": ancestral,
        "ratio_at_equal_steps": ours / plain,
        "ratio_to_the_released_way": ours / ancestral,
        "largest_difference_of_255": int(difference.max()),
        "mean_difference_of_255": float(difference.mean()),
    }


def together(engine: Engine, frames: int, rounds: int, clips: int) -> dict[str, float]:
    """Videos in lock-step against one after the other."""
    turn(engine, 2, clips)  # warms up
    one, many = zip(*((turn(engine, frames)[0], turn(engine, frames, clips)[0]) for _ in range(rounds)), strict=True)
    speed, device = statistics.median(many), engine.device
    flops = speed * engine.sampling.steps * plan(engine.config, None).forward_flops
    return {
        f"frames_per_second_of_{clips}": speed,
        f"ratio_of_{clips}_to_one": speed / statistics.median(one),
        f"share_of_peak_of_{clips}": flops / peak_flops_per_second(device),
        f"peak_memory_mib_of_{clips}": peak_memory(device),
    }


def long_recording(engine: Engine, minutes: float) -> dict[str, float]:
    """Speed and memory at the beginning and at the end of one long video; its frames are dropped."""
    count = round(minutes * 60 * FPS)
    made, part = in_lockstep(engine, [video(engine.unet, count)]), max(1, count // 10)
    speeds, memories = [], []
    for _ in tqdm(range(10), desc=f"{minutes:g} minutes", disable=not sys.stderr.isatty()):
        start = time.perf_counter()
        for _ in range(part):
            next(made, None)
        speeds.append(part / (time.perf_counter() - start))
        memories.append(memory_now(engine.device))
    return {
        "long_minutes": minutes,
        "frames_per_second_first_tenth": speeds[0],
        "frames_per_second_last_tenth": speeds[-1],
        "memory_mib_after_first_tenth": memories[0],
        "memory_mib_at_the_end": memories[-1],
    }


def video(unet: ExtendedUNet, frames: int, seed: int = 0) -> VideoSpec:
    size = unet.config.network.image_size
    photo = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    generator = torch.Generator().manual_seed(seed)
    return VideoSpec(photo, torch.randn(frames, unet.config.conditioning.speech_dim, generator=generator), seed)


def turn(engine: Engine, frames: int, clips: int = 1) -> tuple[float, np.ndarray]:
    """Frames a second, and the frames: on the CPU, so all work is done."""
    videos: Iterator[VideoSpec] = (video(engine.unet, frames, seed) for seed in range(clips))
    start = time.perf_counter()
    made = np.stack([frame for _, frame, _ in in_lockstep(engine, videos, clips)])
    return len(made) / (time.perf_counter() - start), made


def reference_speed(unet: ExtendedUNet, steps: int, frames: int) -> float:
    """Frames a second of the paper's loop: ancestral, float32, everything computed again at every step."""
    spec, device = video(unet, frames), next(unet.parameters()).device
    assert isinstance(spec.speech, Tensor)
    tables = unet.config.extensions.codes
    codes = {code.name: torch.zeros(1, 2 * tables[code.name].context + 1, code.dims) for code in unet.codes}
    heard = audio_cues(spec.speech, unet.config.conditioning.audio_context)
    cues = [Cues(one.audio_window, codes).to(device) for one in heard]
    identity = to_unit(spec.photo)[None].to(device)
    schedule = respaced(training_schedule(unet.config.diffusion), steps)
    start = time.perf_counter()
    made = [frame.cpu() for frame in reference_frames(unet, identity, cues, schedule, random_pictures(identity))]
    return len(made) / (time.perf_counter() - start)


def random_pictures(like: Tensor) -> Iterator[Tensor]:
    while True:
        yield torch.randn_like(like)


def basic_sampling(config: Config, steps: int, solver: str) -> Config:
    """The same network sampled with evenly spread steps and without the extensions of sampling."""
    sampling = asdict(SamplingConfig(steps=steps)) | {"solver": solver}
    motion, sound = {"sampling_noise": 0.0, "anchor": 0.0}, {"guidance": 1.0}
    extensions = {"noise": asdict(NoiseConfig()), "motion": motion, "sound": sound}
    return override(config, {"sampling": sampling, "extensions": extensions})


def random_network(name: str) -> ExtendedUNet:
    torch.manual_seed(0)
    return ExtendedUNet(preset(name)).eval().requires_grad_(False)


def peak_memory(device: torch.device) -> float:
    """MiB: of the tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def memory_now(device: torch.device) -> float:
    """MiB in use: of the tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    with open("/proc/self/statm", encoding="ascii") as file:  # Linux
        return int(file.read().split()[1]) * 4096 / 2**20


if __name__ == "__main__":
    typer.run(main)
