"""How much longer everything takes on a busy machine: with half of the cores taken by other work, and two at once.

    python benchmarks/busy_machine.py
    python benchmarks/busy_machine.py --only sample --rounds 5

Each of the four verbs, and the Python interface, as whole processes on a small real task. Ratios are to the same
process alone; `spinning` is alone, too, but with OpenMP's threads waiting in a loop, as they do by default. Turns
alternate; medians are printed. Nothing else should run at the same time.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
DHEADS = [sys.executable, "-m", "dheads"]
SPINNING = {"GOMP_SPINCOUNT": "300000"}  # what libgomp does where nobody says how to wait
PYTHON = """
import dheads
print(sum(1 for _ in dheads.load(progress=False).frames({face!r}, {sound!r})))
"""
Task = Callable[[Path], list[str]]  # an empty folder to write in -> the command


def main(
    only: Annotated[list[str] | None, typer.Option(help="Only these: sample, prepare, train, eval, python.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one line of JSON.")] = False,
) -> None:
    """Measure a busy machine."""
    with tempfile.TemporaryDirectory() as name:
        tasks = made_tasks(Path(name))
        chosen = {task: tasks[task] for task in only or tasks}
        report = {task: measured(command, rounds, task) for task, command in chosen.items()}
    if as_json:
        print(json.dumps(report))
        return
    print(f"{'':<10}{'alone, s':>10}{'spinning':>10}{'half busy':>11}{'two at once':>13}")
    for task, row in report.items():
        ratios = (row[name] / row["alone"] for name in ("spinning", "half_busy", "two_at_once"))
        print("{:<10}{:>10.2f}{:>10.2f}{:>11.2f}{:>13.2f}".format(task, row["alone"], *ratios))


def made_tasks(folder: Path) -> dict[str, Task]:
    """The commands, and in `folder` what they work on."""
    face, sound = EXAMPLES / "face.jpg", EXAMPLES / "speech.wav"
    raw, data = folder / "raw", folder / "data"
    raw.mkdir()
    run([*DHEADS, "sample", str(face), str(sound), "-o", str(raw / "one.mp4"), "--size", "256", "--quiet"])
    shutil.copy(raw / "one.mp4", raw / "two.mp4")
    prepare = [*DHEADS, "prepare", str(raw), "--preset", "small", "--quiet", "--out"]
    run([*prepare, str(data)])
    train = [*DHEADS, "train", "--data", str(data), "--init", "small", "--quiet", "--set", "run.sample_clips=0"]
    train += ["--set", "optimisation.steps=12", "--set", "extensions.rollouts.share=0"]
    return {
        "sample": lambda out: [*DHEADS, "sample", str(face), str(sound), "-o", str(out / "a.mp4"), "--quiet"],
        "prepare": lambda out: [*prepare, str(out / "data")],
        "train": lambda out: [*train, "--out", str(out / "run")],
        "eval": lambda out: [*DHEADS, "eval", str(raw), "--reference", str(raw), "--quiet", "--json"],
        "python": lambda out: [sys.executable, "-c", PYTHON.format(face=str(face), sound=str(sound))],
    }


def measured(task: Task, rounds: int, name: str) -> dict[str, float]:
    """Median seconds of each way."""
    ways = {"alone": alone, "spinning": spinning, "half_busy": half_busy, "two_at_once": two_at_once}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in tqdm(range(rounds), desc=name, disable=not sys.stderr.isatty()):
        for way, function in ways.items():
            seconds[way].append(function(task))
    return {way: statistics.median(values) for way, values in seconds.items()}


def alone(task: Task) -> float:
    return timed(task, 1)


def spinning(task: Task) -> float:
    return timed(task, 1, SPINNING)


def half_busy(task: Task) -> float:
    with busy((os.cpu_count() or 2) // 2):
        return timed(task, 1)


def two_at_once(task: Task) -> float:
    return timed(task, 2)


def timed(task: Task, count: int, environment: dict[str, str] | None = None) -> float:
    """Until so many of the same, begun together, have all ended."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(count)]
        for folder in folders:
            folder.mkdir()
        began = time.perf_counter()
        processes = [begin(task(folder), environment) for folder in folders]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"{task(folders[0])} ended with {codes}")
        return time.perf_counter() - began


@contextmanager
def busy(count: int) -> Iterator[None]:
    """That many processes that compute without end."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def begin(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | (environment or {}), stdout=subprocess.DEVNULL)


def run(command: list[str]) -> None:
    if begin(command).wait():
        raise SystemExit(f"{command} failed")


if __name__ == "__main__":
    typer.run(main)
