"""Comparing many pairs of videos, in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import torch

from dheads.errors import DheadsError
from dheads.evaluation.comparison import Comparison, compare
from dheads.evaluation.footage import Recording, resized, shortened, track_face
from dheads.evaluation.pairs import FootagePair, VideoPair
from dheads.faces.detection import LandmarkBackend
from dheads.faces.landmarks import load_backend
from dheads.media.containers import opened
from dheads.system.workers import cores, run

_PAIRS_PER_PROCESS = 4  # fewer are compared before another process has started
_DIED = "the process that read it died twice; the video may be too large for this machine's memory"


@dataclass(frozen=True)
class ComparedPair:
    """One pair of videos and the result of their comparison."""

    pair: FootagePair
    comparison: Comparison
    notes: list[tuple[str, str]]  # (how the two videos differ, the values of both)


def compare_pairs(pairs: list[VideoPair], size: int | None, workers: int) -> Iterator[tuple[str, ComparedPair | str]]:
    """Yield (clip, its comparison or the reason why there is none) in the order of `pairs`.

    size: longer side in px to which generated videos are shrunk first; None: as they are.
    workers: number of processes; 0: one per core.
    """
    count = min(workers or cores(), len(pairs) // _PAIRS_PER_PROCESS)
    if count < 2:
        compare_files = partial(_compare_files, load_backend("mesh"), size)
        yield from ((pair.clip, compare_files(pair)) for pair in pairs)
        return
    done: dict[str, ComparedPair | str] = {}
    waiting = iter(pairs)
    due = next(waiting, None)
    with closing(run(partial(_start, size), pairs, count)) as results:
        for pair, result in results:
            done[pair.clip] = result if isinstance(result, ComparedPair | str) else _DIED
            while due is not None and due.clip in done:
                yield due.clip, done.pop(due.clip)
                due = next(waiting, None)


def _start(size: int | None, number: int) -> Callable[[VideoPair], ComparedPair | str]:
    """The function that a worker process runs on each pair."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    return partial(_compare_files, load_backend("mesh"), size)


def _compare_files(backend: LandmarkBackend, size: int | None, files: VideoPair) -> ComparedPair | str:
    paths = files.generated, files.reference
    try:
        generated, reference = (track_face(str(path), Recording(path), backend) for path in paths)
        frames = len(generated.landmarks), len(reference.landmarks)
        if size is not None:
            generated = resized(generated, size)
        pair = FootagePair(files, shortened(generated, min(frames)), shortened(reference, min(frames)))
        moving = None if files.raw is None else track_face(str(files.raw), Recording(files.raw), backend).landmarks
        comparison = compare(pair.generated, pair.reference, None if moving is None else moving[: min(frames)])
        return ComparedPair(pair, comparison, _differences(frames, paths))
    except DheadsError as error:
        return str(error)


def _differences(frames: tuple[int, int], paths: tuple[Path, Path]) -> list[tuple[str, str]]:
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
