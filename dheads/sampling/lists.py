"""Many videos: jobs in lock-step, each network loaded once, and what became of every job."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dheads.config import FPS
from dheads.errors import DheadsError
from dheads.media.writing import container_of, video_writer
from dheads.sampling.engine import Engine
from dheads.sampling.jobs import Job
from dheads.sampling.lockstep import VideoSpec, composed, in_lockstep
from dheads.sampling.outputs import check, sweep
from dheads.sampling.talker import Talker, reporting_compile_errors
from dheads.system.devices import described, own_device, resolve_device
from dheads.system.distributed import world

log = logging.getLogger("dheads")
SLOTS = {"cuda": 16, "mps": 8, "cpu": 8}  # videos in lock-step; more make no more frames a second


@dataclass(frozen=True)
class Outcome:
    """The outcome of one job of a list."""

    output: Path
    frames: int = 0
    seconds: float = 0.0  # length of the video
    notes: list[str] = field(default_factory=list)
    error: str | None = None  # why there is no video
    skipped: bool = False  # it was there already


def sample_all(
    jobs: Sequence[Job],
    *,
    device: str = "auto",
    compiled: bool = False,
    overwrite: bool = False,
    shard: tuple[int, int] | None = None,
    progress: bool = True,
) -> Generator[Outcome, None, None]:
    """Make many videos in lock-step, and yield the outcome of each job as soon as it is known.

    Photos and sounds are read when their turn comes. An output that is there already is kept, unless `overwrite`, so
    that a run that was killed goes on where it stopped; what it left half-written is removed. A job that fails is no
    error: its outcome says why. shard: (3, 16) makes the third of 16 parts; under torchrun each process its own part,
    on its own GPU.
    """
    chosen = own_device(resolve_device(device))
    todo = []
    part, parts = world().own_shard(shard) or (1, 1)
    for job in jobs[part - 1 :: parts]:
        if outcome := _known_outcome(job, overwrite):
            yield outcome
        else:
            todo.append(job)
    sweep(todo)
    if todo:
        share = f", part {part} of {parts}" if parts > 1 else ""
        slots = min(SLOTS[chosen.type], len(todo))
        log.info("make %d videos %s%s: up to %d at once", len(todo), described(chosen), share, slots)
    with tqdm(desc="sample", unit="frame", disable=not progress or not todo) as bar:
        estimate = _Estimate(bar, len(todo))
        for done, outcome in enumerate(_all(todo, chosen, compiled, progress, estimate), 1):
            bar.set_postfix_str(f"{done}/{len(todo)} videos")
            yield outcome


class _Estimate:
    """A bar over frames, whose number is an estimate from the videos that were begun, until all of them are."""

    def __init__(self, bar: tqdm[NoReturn], videos: int) -> None:
        self._bar, self._videos = bar, videos
        self._known: list[int] = []  # frames of videos that were begun

    def begun(self, frames: int | None) -> None:
        """A video of so many frames is begun; None: nobody knows how many."""
        if frames is not None:
            self._known.append(frames)
            self._bar.total = round(self._videos * sum(self._known) / len(self._known))

    def tick(self) -> None:
        """One more frame is made."""
        self._bar.update()


def _all(
    jobs: list[Job], device: torch.device, compiled: bool, progress: bool, estimate: _Estimate
) -> Iterator[Outcome]:
    """One network after the other, each loaded once."""
    for group in _grouped(jobs, lambda job: job.weights):
        try:
            talker = Talker(group[0].weights, device, progress)
        except DheadsError as error:
            yield from (Outcome(job.output_path, error=str(error)) for job in group)
            continue
        for alike in _grouped(group, lambda job: (job.steps, job.solver, job.guidance, job.still)):
            try:
                engine = talker.engine(alike[0], compiled)
            except DheadsError as error:
                yield from (Outcome(job.output_path, error=str(error)) for job in alike)
                continue
            with reporting_compile_errors(compiled):
                yield from _together(talker, engine, alike, estimate)


def _grouped(jobs: Iterable[Job], key: Callable[[Job], Hashable]) -> list[list[Job]]:
    groups: dict[Hashable, list[Job]] = {}
    for job in jobs:
        groups.setdefault(key(job), []).append(job)
    return list(groups.values())


def _together(talker: Talker, engine: Engine, jobs: list[Job], estimate: _Estimate) -> Iterator[Outcome]:
    """Jobs that the same engine makes, in lock-step."""
    refused: deque[Outcome] = deque()  # of jobs whose video could not be begun
    active: dict[int, _Video] = {}  # by index of the videos that were begun
    finished: set[int] = set()  # indices of videos that were made or failed
    indices = count()

    def videos() -> Iterator[VideoSpec]:
        for job in jobs:
            try:
                video = _Video(job, talker)
            except Exception as error:  # whatever a hostile file provokes, the other jobs go on
                refused.append(Outcome(job.output_path, error=_reason(error)))
                estimate.begun(0)
                continue
            active[next(indices)] = video
            estimate.begun(video.frames)
            yield video.spec()

    def finish(index: int, frame: np.ndarray) -> np.ndarray | None:
        video = active.get(index)  # None: it has failed meanwhile
        return None if video is None else video.finish(frame)

    slots = min(SLOTS[engine.device.type], len(jobs))
    try:
        for index, frame, last in composed(in_lockstep(engine, videos(), slots, finished), finish):
            while refused:
                yield refused.popleft()
            estimate.tick()
            if frame is not None and index in active and (outcome := active[index].add(frame, last)):
                del active[index]
                finished.add(index)
                yield outcome
        yield from refused
    finally:
        for video in active.values():
            video.writer.discard()


class _Video:
    """The video of a job while it is made."""

    def __init__(self, job: Job, talker: Talker) -> None:
        """Raises DheadsError for a job that cannot be done; then nothing is left of it."""
        check(job)
        self._output = job.output_path
        self._scene = talker.scene(job)
        self.frames = self._scene.frames  # about how many it will have, if that is known
        self._fault: str | None = None  # what is wrong with the rest of the sound
        self.writer = video_writer(job.output, job.audio, audio_codec=job.audio_codec)

    def spec(self) -> VideoSpec:
        return dataclasses.replace(self._scene.video, speech=self._speech())

    def _speech(self) -> Iterator[Tensor]:
        try:
            yield from self._scene.video.speech
        except Exception as error:  # whatever a hostile file provokes midway, the other jobs go on
            self._fault = _reason(error)

    def finish(self, frame: np.ndarray) -> np.ndarray:
        """The frame of the video that is made of one from `in_lockstep`."""
        return self._scene.finish(frame)

    def add(self, frame: np.ndarray, last: bool) -> Outcome | None:
        """Write the next finished frame; with the last one, or when something fails, the outcome of the job."""
        if self._fault:
            self.writer.discard()
            return Outcome(self._output, error=self._fault)
        try:
            self.writer.add(frame)
            if not last:
                return None
            self.writer.close()
        except DheadsError as error:
            return Outcome(self._output, error=str(error))
        return Outcome(self._output, self.writer.count, self.writer.count / FPS, self._scene.notes + self.writer.notes)


def _reason(error: Exception) -> str:
    if isinstance(error, DheadsError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (unexpected; please report it)"


def _known_outcome(job: Job, overwrite: bool) -> Outcome | None:
    """The outcome of a job that need not be tried."""
    if job.fault is not None:
        return Outcome(job.output_path, error=job.fault)
    try:
        container_of(job.output_path)
    except DheadsError as error:
        return Outcome(job.output_path, error=str(error))
    return Outcome(job.output_path, skipped=True) if not overwrite and os.path.isfile(job.output_path) else None
