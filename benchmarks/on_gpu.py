"""Prove and measure a GPU by one command, in eight minutes.

    python benchmarks/on_gpu.py out              # seven steps, each with a limit of its own
    python benchmarks/on_gpu.py out --dry-run    # the same on the CPU with small networks, in a minute
    python benchmarks/on_gpu.py out --only card --only training
    python benchmarks/gpu_table.py out           # the rows of docs/speed.md

Each step is a process of its own and writes out/STEP.json row by row, with a line on the screen for each: a run that is
cut off keeps what it has, and a step that fails or takes too long does not keep the others from their turn.

card         what it is, and its peak of matrix products, in bf16 where it has that
correctness  the tests marked `gpu`
sampling     frames a second of the packaged network and of one of the paper's size, beside the plain way: float32,
             eager, all conditioning computed again at every step, ancestral
compiled     the same networks by torch.compile, and how soon a later process has its first frame
training     examples a second, and the time spent waiting for data, beside a plain float32 step
long         memory at a tenth and at the end of a minute of speech
prepare      clips a second, with FAN where its weights are, else with the packaged mesh
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from threading import Timer
from typing import Annotated, Any

import torch
import typer
from sample_speed import basic_sampling, long_recording, peak_memory, random_network, reference_speed, turn, video
from train_speed import machine, measure, peak_flops_per_second, random_dataset

from dheads.config import SAMPLE_RATE, Config, override, preset
from dheads.dataset.dataset import Dataset
from dheads.extensions.network import ExtendedUNet
from dheads.media.sound import load_waveform, wav_file
from dheads.sampling.engine import Engine
from dheads.sampling.lockstep import in_lockstep
from dheads.sampling.talker import adjusted, load
from dheads.system.files import complete_or_absent
from dheads.training.plan import plan
from dheads.weights.checkpoints import load_model

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {
    "card": 15,
    "correctness": 100,
    "sampling": 100,
    "compiled": 120,
    "training": 85,
    "long": 25,
    "prepare": 30,
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where and how large."""

    device: torch.device
    dry: bool  # on the CPU with small networks

    def network(self, name: str) -> ExtendedUNet:
        """`small`, the packaged network, or a preset's with random weights, which is as fast as a trained one."""
        torch.manual_seed(0)
        if self.dry:
            return random_network("tiny").to(self.device)
        return load_model("small", self.device)[0] if name == "small" else random_network(name).to(self.device)

    def steps(self) -> tuple[int, ...]:
        """Of sampling."""
        return (2,) if self.dry else (8, 3, 25)

    def config(self, name: str) -> Config:
        return preset("tiny" if self.dry else name)


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the JSON files.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="On the CPU, with small networks.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only these steps.")] = None,
    step: Annotated[str | None, typer.Option(help="Only this step, in this process: a row a line.")] = None,
) -> None:
    """Prove and measure a GPU."""
    if step is not None:
        for row in STEPS[step](Place(torch.device("cpu" if dry_run else "cuda"), dry_run)):
            print(json.dumps(row), flush=True)
        return
    if not dry_run and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --dry-run does the same on the CPU")
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for name in only or SECONDS:
        run(name, out / f"{name}.json", dry_run)
    print(f"done in {time.monotonic() - began:.0f} s; python benchmarks/gpu_table.py {out}", flush=True)


def run(step: str, path: Path, dry: bool) -> None:
    """One step in a process of its own, whose rows are in the file as soon as they are known."""
    command = [sys.executable, str(Path(__file__)), str(path.parent), "--step", step, *(["--dry-run"] if dry else [])]
    began, rows = time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT) as process:
        # The CPU of a dry run may be slow, and nobody pays for its time.
        timer = Timer(SECONDS[step] * (10 if dry else 1), lambda: os.killpg(process.pid, signal.SIGKILL))
        timer.start()
        for line in process.stdout or ():
            rows.append(json.loads(line))
            write(path, rows, time.monotonic() - began, None)
            print(f"{step:<12} {described(rows[-1])}", flush=True)
        timer.cancel()
    seconds = time.monotonic() - began
    write(path, rows, seconds, process.returncode)
    ending = {0: "done", -signal.SIGKILL: "cut off"}.get(process.returncode, "failed")
    print(f"{step:<12} {ending} after {seconds:.0f} s", flush=True)


def write(path: Path, rows: list[Row], seconds: float, code: int | None) -> None:
    """code: the exit code of the step; None while it runs."""
    with complete_or_absent(path) as part:
        part.write_text(json.dumps({"rows": rows, "seconds": seconds, "exit_code": code}, indent=1), encoding="utf-8")


def described(row: Row) -> str:
    texts = ((name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in row.items())
    return ", ".join(f"{name} {text}" for name, text in texts)


# ---- The steps ----


def card(place: Place) -> Iterator[Row]:
    yield {
        "machine": machine(place.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if not place.dry else None,
        "dry_run": place.dry,
    }
    yield {"peak_flops_per_second": peak_flops_per_second(place.device, 1 if place.dry else 5)}


def correctness(place: Place) -> Iterator[Row]:
    """A row a test. The options of pyproject.toml are left out: its plug-ins may not be here."""
    import pytest

    # These take a minute on a CPU, which replays nothing.
    chosen = "not processes and not compiled and not resumed and not -16] and not replayed" if place.dry else ""

    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what pytest says itself

    class Outcomes:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                row = {"test": report.nodeid.partition("::")[2], "outcome": report.outcome, "seconds": report.duration}
                if report.failed:
                    row["why"] = report.longreprtext[-2000:]
                rows.write(json.dumps(row) + "\n")
                rows.flush()

    if place.dry:
        os.environ["DHEADS_TEST_DEVICE"] = "cpu"
    tests = ROOT / "tests" / "sampling" / "test_gpu.py"
    pytest.main(["-o", "addopts=", "-q", "-p", "no:cacheprovider", "-k", chosen, str(tests)], [Outcomes()])
    yield from ()


def sampling(place: Place) -> Iterator[Row]:
    peak = peak_flops_per_second(place.device, 1 if place.dry else 2)
    videos = {"small": (3,), "crema": (1,)} if place.dry else dict.fromkeys(("small", "crema"), (1, 16))
    for name, numbers in videos.items():
        unet = place.network(name)
        for clips in numbers:
            for count in place.steps():
                yield engine_row(place, name, unet, count, clips, False, peak)
        yield from plain_rows(place, name, unet)
        del unet


def compiled(place: Place) -> Iterator[Row]:
    peak = peak_flops_per_second(place.device, 1 if place.dry else 2)
    for name, clips in (("crema", 1), ("small", 1), ("crema", 16), ("small", 16)):
        if place.dry and (name, clips) != ("small", 1):
            continue  # a CPU compiles for a minute
        unet = place.network(name)
        for count in place.steps():
            yield engine_row(place, name, unet, count, clips, not place.dry, peak)
        if clips == 1:
            yield first_frame_row(place, name)
        del unet


@lru_cache
def forward_flops(config: Config) -> int:
    return plan(config, None).forward_flops


def engine_row(
    place: Place, name: str, unet: ExtendedUNet, steps: int, clips: int, is_compiled: bool, peak: float
) -> Row:
    """Medians would take three times as long: the second of two turns counts."""
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    engine = Engine(unet, basic_sampling(unet.config, steps, "dpm++2m"), compiled=is_compiled)
    began = time.perf_counter()
    next(in_lockstep(engine, [video(unet, 1)]))
    first = time.perf_counter() - began
    frames = 4 if place.dry else 40 if clips == 1 else 12
    turn(engine, 3, clips)  # warms up and records
    speed, _ = turn(engine, frames, clips)
    return {
        "network": name,
        "way": "compiled" if is_compiled else "eager",
        "steps": steps,
        "videos": clips,
        "frames_per_second": speed,
        "share_of_peak": speed * steps * forward_flops(unet.config) / peak,
        "seconds_to_first_frame": first,
        "memory_mib": peak_memory(place.device),
    }


def plain_rows(place: Place, name: str, unet: ExtendedUNet) -> Iterator[Row]:
    """At as many steps as ours, and in the 100 that the released code takes."""
    for steps, frames in ((2, 2),) if place.dry else ((8, 8), (100, 3)):
        reference_speed(unet, steps, 1)
        speed = reference_speed(unet, steps, frames)
        yield {"network": name, "way": "plain", "steps": steps, "videos": 1, "frames_per_second": speed}


def first_frame_row(place: Place, name: str) -> Row:
    """Of a fresh process that finds what was compiled before: from its start to its first picture."""
    began = time.perf_counter()
    command = [sys.executable, str(Path(__file__)), str(ROOT), "--step", f"first frame of {name}"]
    subprocess.run([*command, *(["--dry-run"] if place.dry else [])], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    return {"network": name, "way": "a fresh process, compiled before", "seconds_to_first_frame": seconds}


def first_frame(name: str, place: Place) -> Iterator[Row]:
    unet = place.network(name)
    engine = Engine(unet, basic_sampling(unet.config, 8, "dpm++2m"), compiled=not place.dry)
    next(in_lockstep(engine, [video(unet, 1)]))
    yield from ()


def training(place: Place) -> Iterator[Row]:
    ways = [("crema", None, False), ("small", 256, False), ("small", None, False)]
    ways += [("crema", None, True), ("small", 256, True)]
    if place.dry:
        ways = ways[1:3]
    steps = 1 if place.dry else 10
    with tempfile.TemporaryDirectory() as folder:
        for name, batch, is_compiled in ways:
            optimisation = {"precision": "bf16"} | ({} if batch is None or place.dry else {"batch_size": batch})
            config = override(place.config(name), {"optimisation": optimisation, "run": {"compile": is_compiled}})
            data = Path(folder) / name
            if not data.exists():
                data.mkdir()
                random_dataset(data, config)
            report = measure(Dataset(data), config, place.device, steps, 1 if place.dry else 3)
            report.pop("turns")
            yield {"preset": name, "way": "compiled" if is_compiled else "eager", **report}


def long(place: Place) -> Iterator[Row]:
    unet = place.network("small")
    config = adjusted(unet.config, steps=2 if place.dry else None)
    yield long_recording(Engine(unet, config), 0.02 if place.dry else 1)


def prepare(place: Place) -> Iterator[Row]:
    """Clips of a face that the packaged network lets speak: real ones need not be at hand."""
    fan = Path(torch.hub.get_dir()) / "checkpoints" / "2DFAN4-11f355bf06.pth.tar"
    landmarks = "fan" if fan.exists() and not place.dry else "mesh"
    count = 1 if place.dry else 32
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / "raw"
        raw.mkdir()
        examples, sound = ROOT / "examples", Path(name) / "speech.wav"
        seconds = 0.2 if place.dry else 3
        spoken = load_waveform(examples / "speech.wav").repeat(2)[: round(seconds * SAMPLE_RATE)]
        sound.write_bytes(wav_file(spoken).getvalue())
        load("small", place.device.type, progress=False).sample(
            examples / "face.jpg", sound, raw / "clip-0.mp4", size=256, steps=2 if place.dry else None
        )
        for number in range(1, count):
            shutil.copy(raw / "clip-0.mp4", raw / f"clip-{number}.mp4")
        command = [sys.executable, "-m", "dheads", "prepare", str(raw), "--out", str(Path(name) / "data"), "--quiet"]
        command += ["--preset", "small", "--set", f"alignment.landmarks={landmarks}", "--device", place.device.type]
        began = time.perf_counter()
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
    yield {"landmarks": landmarks, "clips": count, "clips_per_second": count / seconds}


STEPS = {
    "card": card,
    "correctness": correctness,
    "sampling": sampling,
    "compiled": compiled,
    "training": training,
    "long": long,
    "prepare": prepare,
    "first frame of small": partial(first_frame, "small"),
    "first frame of crema": partial(first_frame, "crema"),
}


if __name__ == "__main__":
    typer.run(main)
