"""A function run over many items in processes that may die: one bad item must not end a run of days."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from dheads.errors import DheadsError
from dheads.system.ending import ended_cleanly, undo_all
from dheads.system.startup import open_streams

_PATIENCE_SECONDS = 5  # for a process to undo what it has under way
# Called once in each process, with the process's number from 0; makes the function that does the work.
Start = Callable[[int], Callable[[Any], Any]]


class Died:
    """The result of an item whose process died at it twice."""


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(start: Start, items: Iterable[Any], count: int) -> Iterator[tuple[Any, Any]]:
    """Every item with its result, as they are done, by up to `count` processes that each work on one item at a time.

    The first process starts alone, so that the others find what it downloads. An item whose process dies is tried again
    after all others, alone, as it may have died of the others' hunger for memory. `start`, items and results travel by
    pickle. Closing the generator ends the processes.

    Raises the DheadsError that `start` or the function raises, and one when no process lives to begin its work.
    """
    suspects = []
    for item, result in _pass(start, items, count):
        if result is Died:
            suspects.append(item)
        else:
            yield item, result
    yield from _pass(start, suspects, 1)


def _pass(start: Start, items: Iterable[Any], count: int) -> Iterator[tuple[Any, Any]]:
    queue = deque(items)
    crew: dict[Connection, _Worker] = {}
    others = range(1, min(count, len(queue)))
    try:
        if queue:
            _hire(crew, start, 0)
        while crew:
            for pipe in wait(list(crew)):
                worker = crew[pipe]
                message, done = worker.receive(), worker.item
                if isinstance(message, DheadsError):
                    raise message
                if message is not Died and queue:
                    worker.give(queue.popleft())
                    for number in others:
                        _hire(crew, start, number)
                    others = range(0)
                else:
                    crew.pop(pipe).end()
                    if done is not None and queue:  # one that died as it started would do so again
                        _hire(crew, start, worker.number)
                if done is not None:
                    yield done, message
        if queue:
            raise DheadsError("the worker processes die as they start; try fewer --workers, they may lack memory")
    finally:
        for worker in crew.values():
            worker.end()


def _hire(crew: dict[Connection, _Worker], start: Start, number: int) -> None:
    worker = _Worker(start, number)
    crew[worker.pipe] = worker


class _Worker:
    def __init__(self, start: Start, number: int) -> None:
        # Spawned, not forked: the libraries below hold threads, which a fork would leave in pieces.
        context = multiprocessing.get_context("spawn")
        self.number = number
        self.item: Any = None  # in work; None while it starts
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(start, number, theirs), daemon=True)
        self.process.start()
        theirs.close()  # or the end of the process would not end the pipe

    def give(self, item: Any) -> None:
        self.item = item
        try:
            self.pipe.send(item)
        except OSError:  # it has just died, which the next look at its pipe will tell
            return

    def receive(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return Died

    def end(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join(_PATIENCE_SECONDS)
        self.process.kill()
        self.process.join()


def _serve(start: Start, number: int, pipe: Connection) -> None:
    open_streams()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    try:
        with ended_cleanly():
            work = start(number)
            pipe.send(None)  # ready
            while True:
                pipe.send(work(pipe.recv()))
    except DheadsError as error:
        pipe.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # nobody is left to work for
        return


def _end_with_the_first() -> None:
    """However the process that started this one ends: nobody is left to work for."""
    multiprocessing.parent_process().join()
    undo_all()
    os._exit(1)
