"""How fast sampling is: the engine against the plain way of the same network, in one run.

    python benchmarks/sample_speed.py
    python benchmarks/sample_speed.py --preset crema --device cuda --steps 8    # the paper's network on a GPU

The plain way is float32 as PyTorch comes, eager, contiguous, with all conditioning computed anew at every step. Two
comparisons: at equal steps and the same solver, with the largest difference of a pixel; and of the engine's default
against ancestral sampling in 100 steps, as the released code does it. Turns alternate; medians are told. Without
--preset it is the packaged network; with it random weights of that preset, which are as fast as trained ones.
Seconds to the first frame are those from a loaded network to its first picture, the first time in this process.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from tqdm import tqdm
from train_speed import machine

from dheads.conditioning import Condition
from dheads.config import preset
from dheads.denoiser import Denoiser
from dheads.diffusion import Denoise, respaced
from dheads.engine import Engine
from dheads.model import UNet
from dheads.sample import generate, resolve_device
from dheads.weights import load_model

RELEASED_STEPS = 100


class Plain:
    """The engine's interface to the network as it is."""

    def __init__(self, unet: UNet, steps: int) -> None:
        self.unet, self.config, self.device = unet, unet.config, next(unet.parameters()).device
        self._denoiser = Denoiser(unet)
        self.schedule = respaced(self._denoiser.schedule, steps, self.config.sampling.spacing)

    def frame(self, condition: Condition) -> Denoise:
        return lambda x_t, t: self._denoiser(x_t, t, condition)[0]


def main(
    preset_name: Annotated[str | None, typer.Option("--preset", help="Random weights of this preset.")] = None,
    weights: Annotated[str, typer.Option(help="Else these.")] = "small",
    steps: Annotated[int | None, typer.Option(help="The weights' own by default.")] = None,
    frames: Annotated[int, typer.Option(help="Of a turn; the plain way's 100 steps get a tenth of them.")] = 20,
    rounds: int = 3,
    device: str = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one line of JSON.")] = False,
) -> None:
    """Measure the speed of sampling."""
    place = resolve_device(device)
    unet = random_network(preset_name).to(place) if preset_name else load_model(weights, place)[0]
    steps, solver = steps or unet.config.sampling.steps, unet.config.sampling.solver
    size, told = unet.config.model.image_size, unet.config.conditioning
    photo = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    speech = torch.randn(frames, told.speech_dim, generator=torch.Generator().manual_seed(0))

    start = time.perf_counter()
    engine = Engine(unet, steps)
    next(generate(engine, photo, speech, solver=solver))
    first = time.perf_counter() - start
    plain, released = Plain(unet, steps), Plain(unet, RELEASED_STEPS)
    ways = {
        "ours": (engine, solver, photo, speech),
        "plain": (plain, solver, photo, speech),
        "released": (released, "ddpm", photo, speech[: max(1, frames // 10)]),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    pictures: dict[str, np.ndarray] = {}
    for _ in tqdm(range(rounds), desc="rounds", disable=not sys.stderr.isatty()):
        for name, way in ways.items():
            speed, pictures[name] = turn(*way)
            speeds[name].append(speed)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    difference = np.abs(pictures["ours"].astype(int) - pictures["plain"])
    report = {
        "machine": f"{machine(place)}; torch {torch.__version__}, {torch.get_num_threads()} threads",
        "network": f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters, {size} px",
        "steps": f"{steps} of {solver}, {engine.dtype}",
        "frames_per_second": medians["ours"],
        "plain_frames_per_second": medians["plain"],
        "released_frames_per_second": medians["released"],
        "ratio_at_equal_steps": medians["ours"] / medians["plain"],
        "largest_difference_of_255": int(difference.max()),
        "mean_difference_of_255": float(difference.mean()),
        "ratio_to_the_released_way": medians["ours"] / medians["released"],
        "seconds_to_first_frame": first,
        "peak_memory_mib": peak_memory(place),
    }
    if as_json:
        print(json.dumps(report | {"turns": speeds}))
    else:
        print("\n".join(f"{k:<27} {v:.4g}" if isinstance(v, float) else f"{k:<27} {v}" for k, v in report.items()))


def turn(engine: Engine, solver: str, photo: np.ndarray, speech: Tensor) -> tuple[float, np.ndarray]:
    """Frames a second, and the frames."""
    start = time.perf_counter()
    frames = np.stack(list(generate(engine, photo, speech, solver=solver)))  # on the CPU, so all work is done
    return len(frames) / (time.perf_counter() - start), frames


def random_network(name: str) -> UNet:
    torch.manual_seed(0)
    return UNet(preset(name)).eval().requires_grad_(False)


def peak_memory(device: torch.device) -> float:
    """MiB: of the tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    typer.run(main)
