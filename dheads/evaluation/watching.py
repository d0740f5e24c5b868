"""Pairs of videos read, their faces followed, and compared: by as many processes as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import torch

from dheads.errors import DheadsError
from dheads.evaluation.comparison import Comparison, Pair, compare
from dheads.evaluation.footage import Recording, resized, shortened, watch
from dheads.faces.detection import LandmarkBackend
from dheads.faces.landmarks import load_backend
from dheads.media.containers import opened
from dheads.system.workers import Died, cores, run

_PAIRS_A_PROCESS = 4  # fewer are done before it has started
_DIED = "the process that read it died twice; the video may be too large for this machine's memory"
Name = tuple[str, Path, Path]  # clip, generated, real


@dataclass(frozen=True)
class Watched:
    """One pair and what is found of it."""

    pair: Pair
    comparison: Comparison
    notes: list[tuple[str, str]]  # how the two videos differ: what, and the figures


def in_parallel(names: list[Name], size: int | None, workers: int) -> Iterator[tuple[str, Watched | str]]:
    """Every clip in the given order with what is found of it, or the reason why nothing is.

    size: the longer side in px to which generated videos are shrunk first; None: their own.
    workers: processes; 0: one a core.
    """
    count = min(workers or cores(), len(names) // _PAIRS_A_PROCESS)
    if count < 2:
        look = partial(_look, load_backend("mesh"), size)
        yield from ((name[0], look(name)) for name in names)
        return
    done: dict[str, Watched | str] = {}
    waiting = iter(names)
    due = next(waiting, None)
    with closing(run(partial(_start, size), names, count)) as results:
        for (clip, *_), result in results:
            done[clip] = _DIED if result is Died else result
            while due is not None and due[0] in done:
                yield due[0], done.pop(due[0])
                due = next(waiting, None)


def _start(size: int | None, number: int) -> Callable[[Name], Watched | str]:
    """The work of a process, which is one of many."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    return partial(_look, load_backend("mesh"), size)


def _look(backend: LandmarkBackend, size: int | None, name: Name) -> Watched | str:
    clip, *paths = name
    try:
        ours, real = (watch(str(path), Recording(path), backend) for path in paths)
        frames = len(ours.landmarks), len(real.landmarks)
        if size is not None:
            ours = resized(ours, size)
        pair = Pair(clip, shortened(ours, min(frames)), shortened(real, min(frames)), (paths[0], paths[1]))
        return Watched(pair, compare(pair.generated, pair.reference), _differences(frames, paths))
    except DheadsError as error:
        return str(error)


def _differences(frames: tuple[int, int], paths: list[Path]) -> list[tuple[str, str]]:
    found = []
    if frames[0] != frames[1]:
        lengths = f"{frames[0]} and {frames[1]} frames"
        found.append(("not as long as the real one, and compared over the common time", lengths))
    rates = [_fps(path) for path in paths]
    if abs(rates[0] - rates[1]) > 0.01:
        found.append(("not of the real one's frame rate, and compared at 25", f"{rates[0]:g} and {rates[1]:g}"))
    return found


def _fps(path: Path) -> float:
    with opened(path, str(path)) as container:
        return float(next(stream.average_rate or 0 for stream in container.streams.video))
