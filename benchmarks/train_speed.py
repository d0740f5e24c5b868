"""How fast training is: our step against a plain one of the same network, in one run.

    python benchmarks/train_speed.py --preset small --data prepared
    python benchmarks/train_speed.py --preset crema --device cuda --compile --steps 50    # the paper's network on a GPU

Our step is that of `dheads train`: bf16 autocast, the layout that suits the device, fused optimiser, batches made ahead
by threads, and torch.compile where asked. The plain step is float32 as PyTorch comes (on CUDA its convolutions use
TF32), contiguous, eager, with PyTorch's default optimiser, and makes its batch when it needs it. Both minimise the same
loss of the same examples, load their data within the time that is taken, and take turns; medians over the turns are
printed. Waiting is the share of our time until a batch is there, the first one of every turn included.

Without --data a dataset of random pictures is made. On a GPU it lies in the card's memory, as a corpus that fits there;
on a CPU its frames are read by seeking, as those of a corpus that is larger than memory; so are the plain step's. The
peak is that of matrix products on the same device in the same run. Both the step and the peak are in bf16 only where
the device has that arithmetic. FLOPs are the network's own: three forward passes an example, however often they are
computed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import typer
from safetensors.torch import save_file
from tqdm import tqdm

from dheads.config import FPS, SAMPLE_RATE, Config, override, preset, toml_text
from dheads.dataset.clips import ResidentClips, fits
from dheads.dataset.dataset import Dataset, dataset_info
from dheads.dataset.manifest import Clip, clip_path, write_clips
from dheads.denoiser import Denoiser
from dheads.extensions.network import ExtendedUNet
from dheads.media.writing import write_clip
from dheads.system.devices import best_dtype, resolve_device, usable_precision
from dheads.training.batches import Batches
from dheads.training.objective import tallied, tally, training_loss
from dheads.training.plan import plan
from dheads.training.state import TrainingState, learning_rate
from dheads.training.threads import suit

CLIPS, CLIP_FRAMES = 32, 50  # of the dataset of random pictures
PEAK_SIDE = {"cuda": 8192}  # of the matrices that measure the peak
SMALL_PEAK_SIDE = 2048  # on any other device


@dataclass(frozen=True)
class Turn:
    """Some steps in a row."""

    examples: int
    seconds: float
    waiting_seconds: float  # for data


def main(
    preset_name: Annotated[str, typer.Option("--preset", help="Configuration to train.")] = "small",
    data: Annotated[Path | None, typer.Option(help="Dataset made by `dheads prepare`; else random pictures.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples at once; the preset's by default.")] = None,
    precision: Annotated[str, typer.Option(help="Of our step: bf16 or fp32.")] = "bf16",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile our step.")] = False,
    steps: Annotated[int, typer.Option(help="Steps a turn.")] = 10,
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 5,
    device: str = "auto",
    threads: Annotated[int | None, typer.Option(help="Processor cores to compute with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one line of JSON.")] = False,
) -> None:
    """Measure the speed of training."""
    if threads:
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
    place = resolve_device(device)
    optimisation = {"precision": precision} | ({"batch_size": batch_size} if batch_size else {})
    config = override(preset(preset_name), {"optimisation": optimisation, "run": {"compile": compiled}})
    with tempfile.TemporaryDirectory() as folder:
        dataset = Dataset(data or random_dataset(Path(folder), config))
        dataset.check(config)
        if data is None:
            dataset._keep = False  # a small dataset's decoded frames
        report = measure(dataset, config, place, steps, rounds)
    print(json.dumps(report) if as_json else "\n".join(lines(report)))


def measure(dataset: Dataset, config: Config, device: torch.device, steps: int, rounds: int) -> dict:
    """Everything that the screen shows, as plain values."""
    precision = usable_precision(config.optimisation.precision, device)
    config = override(config, {"optimisation": {"precision": precision}})
    clips, parts = dataset.split("train"), config.run.accumulate
    batches, resident = Batches(dataset, clips, config, parts), None
    if fits(dataset, clips, device):
        resident = ResidentClips(dataset, clips, config.conditioning.speech_dim, device, threads=os.cpu_count() or 1)
    ours = OurTrainer(Batches(dataset, clips, config, parts, resident), config, device)
    ours.run(steps)  # compiles, fills caches, tries algorithms
    memory_bytes = memory(device)  # before the plain step's are added
    plain = PlainTrainer(batches, config, device)
    plain.run(steps)
    turns: dict[str, list[Turn]] = {"plain": [], "ours": []}
    for _ in tqdm(range(rounds), desc="rounds", disable=not sys.stderr.isatty()):
        turns["plain"].append(plain.run(steps))
        turns["ours"].append(ours.run(steps))
    costs = plan(config, clips=None)
    return {
        "machine": machine(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "preset": config.name,
        "parameters": costs.parameters,
        "batch_size": config.optimisation.batch_size,
        "precision": config.optimisation.precision,
        "compiled": config.run.compile,
        "resident": resident is not None,
        "steps": steps,
        "turns": {name: [asdict(turn) for turn in some] for name, some in turns.items()},
        "planned_memory_bytes": costs.memory_bytes,
        "memory_bytes": memory_bytes,
        **summary(turns["plain"], turns["ours"], 3 * costs.forward_flops, peak_flops_per_second(device)),
    }


def summary(plain: list[Turn], ours: list[Turn], example_flops: int, peak: float) -> dict[str, float]:
    """The figures that count; medians over the turns. example_flops: of training on one example; peak: FLOP/s."""
    speed = statistics.median(turn.examples / turn.seconds for turn in ours)
    plain_speed = statistics.median(turn.examples / turn.seconds for turn in plain)
    return {
        "examples_per_second": speed,
        "plain_examples_per_second": plain_speed,
        "ratio": speed / plain_speed,
        "waiting": statistics.median(turn.waiting_seconds / turn.seconds for turn in ours),
        "plain_waiting": statistics.median(turn.waiting_seconds / turn.seconds for turn in plain),
        "example_flops": example_flops,
        "flops_per_second": speed * example_flops,
        "peak_flops_per_second": peak,
        "share_of_peak": speed * example_flops / peak,
    }


def lines(report: dict) -> list[str]:
    how = f"{report['precision']}{', compiled' if report['compiled'] else ''}"
    how += ", clips on the device" if report["resident"] else ""
    rows = {
        "machine": f"{report['machine']}; torch {report['torch']}, {report['threads']} threads",
        "network": f"{report['preset']}, {report['parameters'] / 1e6:.1f} M parameters",
        "plain": f"{report['plain_examples_per_second']:.4g} examples/s {spread(report, 'plain')}",
        "ours": f"{report['examples_per_second']:.4g} examples/s {spread(report, 'ours')}, {how}",
        "ratio": f"{report['ratio']:.2f}",
        "waiting": f"{report['waiting']:.1%} of our time, {report['plain_waiting']:.1%} of the plain step's",
        "work": f"{report['example_flops'] / 1e12:.4g} TFLOP an example, "
        f"{report['example_flops'] * report['batch_size'] / 1e12:.4g} a batch of {report['batch_size']}",
        "reached": f"{report['flops_per_second'] / 1e12:.4g} TFLOP/s, {report['share_of_peak']:.1%} of the peak of "
        f"{report['peak_flops_per_second'] / 1e12:.4g} (matrix products)",
    }
    if report["memory_bytes"] is not None:
        rows["memory"] = (
            f"{report['memory_bytes'] / 2**30:.1f} GiB, planned {report['planned_memory_bytes'] / 2**30:.1f}"
        )
    return [f"{name:<8} {text}" for name, text in rows.items()]


def spread(report: dict, name: str) -> str:
    speeds = sorted(turn["examples"] / turn["seconds"] for turn in report["turns"][name])
    return f"({speeds[0]:.4g} to {speeds[-1]:.4g} in {len(speeds)} turns of {report['steps']} steps)"


# ---- Two ways to train ----


class OurTrainer:
    """The step of `dheads train`."""

    def __init__(self, batches: Batches, config: Config, device: torch.device) -> None:
        self.batches, self.config, self.device = batches, config, device
        unet = seeded(config).to(device).train()
        suit(unet, device, config.run.compile)
        self.state = TrainingState(unet, config, config.run.accumulate)
        if config.run.compile:
            unet.compile()
        self.denoiser = Denoiser(unet, config.optimisation.precision)
        self.threads = min(8, os.cpu_count() or 1) if device.type == "cuda" else 1

    def run(self, steps: int) -> Turn:
        parts = range(self.config.run.accumulate)
        keys = [(self.state.step + step, part) for step in range(steps) for part in parts]
        with timed(self.device, benchmark=True) as clock, closing(self.batches.ahead(keys, self.threads)) as queue:
            for _ in range(steps):
                self.state.optimizer.zero_grad(set_to_none=True)
                sums = torch.zeros(len(tallied(self.config)), 2, device=self.device)
                for part in parts:
                    with clock.waiting():
                        batch = next(queue)
                    terms = training_loss(self.denoiser, batch, self.config, self.state.step, part)
                    (terms["loss"].mean() / len(parts)).backward()
                    sums += tally(terms, self.config)
                norm = self.state.clip_gradient()
                *flat, norm = torch.cat([sums.flatten(), norm[None]]).tolist()
                self.state.advance(
                    flat[0] / flat[1], norm, learning_rate(self.config, self.state.step, self.state.progress)
                )
        return clock.turn(len(keys) * self.config.optimisation.batch_size)


class PlainTrainer:
    """A training step without any optimisation of speed."""

    def __init__(self, batches: Batches, config: Config, device: torch.device) -> None:
        self.batches, self.config, self.device, self.step = batches, config, device, 0
        self.unet, self.ema = seeded(config).to(device).train(), seeded(config).to(device)
        self.denoiser = Denoiser(self.unet)
        optimisation = config.optimisation
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=optimisation.learning_rate, weight_decay=optimisation.weight_decay
        )

    def run(self, steps: int) -> Turn:
        optimisation, accumulate = self.config.optimisation, self.config.run.accumulate
        with timed(self.device, benchmark=False) as clock:
            for _ in range(steps):
                self.optimizer.zero_grad()
                for part in range(accumulate):
                    with clock.waiting():
                        batch = self.batches.batch(self.step, part)
                    terms = training_loss(self.denoiser, batch, self.config, self.step, part)
                    (terms["loss"].mean() / accumulate).backward()
                if optimisation.grad_clip is not None:
                    torch.nn.utils.clip_grad_norm_(self.unet.parameters(), optimisation.grad_clip)
                self.optimizer.step()
                with torch.no_grad():
                    for average, parameter in zip(self.ema.parameters(), self.unet.parameters(), strict=True):
                        average.lerp_(parameter, 1 - optimisation.ema_decay)
                self.step += 1
        return clock.turn(steps * accumulate * optimisation.batch_size)


def seeded(config: Config) -> ExtendedUNet:
    torch.manual_seed(config.optimisation.seed)
    return ExtendedUNet(config)


class Clock:
    def __init__(self) -> None:
        self.seconds = self.waiting_seconds = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waiting_seconds += time.perf_counter() - start

    def turn(self, examples: int) -> Turn:
        return Turn(examples, self.seconds, self.waiting_seconds)


@contextmanager
def timed(device: torch.device, benchmark: bool) -> Iterator[Clock]:
    """Measure the time of a block until the device has finished. benchmark: whether cuDNN tries its algorithms."""
    torch.backends.cudnn.benchmark = benchmark
    clock = Clock()
    synchronize(device)
    start = time.perf_counter()
    yield clock
    synchronize(device)
    clock.seconds = time.perf_counter() - start


# ---- The machine ----


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def memory(device: torch.device) -> int | None:
    """The most bytes that tensors have taken so far; None on devices that do not count them."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    try:
        rows = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(row.partition(":")[2].strip() for row in rows if row.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores{'' if device.type == 'cpu' else f', {device.type}'}"


def peak_flops_per_second(device: torch.device, repeats: int = 5) -> float:
    """FLOP/s of matrix products in the device's best precision, the best of some tries."""
    side = PEAK_SIDE.get(device.type, SMALL_PEAK_SIDE)
    a, b = (torch.randn(side, side, device=device, dtype=best_dtype(device)) for _ in range(2))
    products = 20 if device.type == "cuda" else 1
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        synchronize(device)
        start = time.perf_counter()
        for _ in range(products):
            a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return products * 2 * side**3 / min(seconds[1:])


# ---- Random pictures ----


def random_dataset(root: Path, config: Config) -> Path:
    """A prepared dataset in the empty folder `root`: soft moving colours with some grain, which compress to as many
    bytes as faces, and random labels."""
    rng = np.random.default_rng(0)
    size, speech_dim = config.network.image_size, config.conditioning.speech_dim
    clips = [
        Clip(f"speaker{k % 8}/clip{k:02}", f"speaker{k % 8}", "train", CLIP_FRAMES, "random") for k in range(CLIPS)
    ]
    for clip in tqdm(clips, desc="random pictures", disable=not sys.stderr.isatty()):
        path = clip_path(root, clip.clip, "mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        sound = rng.normal(0, 0.1, SAMPLE_RATE * CLIP_FRAMES // FPS)
        write_clip(path, random_frames(rng, size), torch.from_numpy(sound).float())
        box = torch.tensor([0.35, 0.6, 0.65, 0.85]) * size
        labels = {
            "speech": torch.from_numpy(rng.normal(size=(CLIP_FRAMES, speech_dim))).half(),
            "landmarks": torch.from_numpy(rng.uniform(0, size, (CLIP_FRAMES, 68, 2))).float(),
            "mouth_box": box.round().repeat(CLIP_FRAMES, 1),
            "lips": torch.from_numpy(rng.uniform(0, 1, (CLIP_FRAMES, 3))).float(),
            "eyes": torch.from_numpy(rng.uniform(0, 1, CLIP_FRAMES)).float(),
        }
        save_file(labels, path.with_suffix(".safetensors"))
    write_clips(root, clips)
    (root / "dataset.toml").write_text(toml_text(dataset_info(config)), encoding="utf-8")
    return root


def random_frames(rng: np.random.Generator, size: int) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8: from one pattern of colours to another."""
    begin, end = (cv2.resize(rng.uniform(0, 255, (8, 8, 3)), (size, size)) for _ in range(2))
    grain = rng.normal(0, 2, (size, size, 1))
    for share in np.linspace(0, 1, CLIP_FRAMES):
        yield (begin * (1 - share) + end * share + grain).clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    typer.run(main)
