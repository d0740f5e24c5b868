"""A function applied to many items by worker processes. They may die: one bad item must not end a run of days."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeAlias, TypeVar, cast

from dheads.errors import DheadsError
from dheads.system.signals import ended_cleanly, undo_all
from dheads.system.startup import open_streams

Item = TypeVar("Item")
Result = TypeVar("Result")
# Called once in each process, with the process's number from 0; makes the function that does the work.
Start: TypeAlias = Callable[[int], Callable[[Item], Result]]

_END_SECONDS = 5  # for a process to undo its work in progress


class Died:
    """The result of an item at which its process died twice."""


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(start: Start[Item, Result], items: Iterable[Item], count: int) -> Generator[tuple[Item, Result | type[Died]]]:
    """Yield every item with its result, as they are finished, by up to `count` processes with one item each at a time.

    The first process starts alone, so that the others find the files it downloads. An item whose process dies is tried
    again after all others, alone, as the processes together may have lacked memory. `start`, items and results are
    pickled. Closing the generator ends the processes.

    Raises any DheadsError of `start` or of the function, and one where no process lives to begin its work.
    """
    suspects = []
    for item, result in _pass(start, items, count):
        if result is Died:
            suspects.append(item)
        else:
            yield item, result
    yield from _pass(start, suspects, 1)


def _pass(start: Start[Item, Result], items: Iterable[Item], count: int) -> Iterator[tuple[Item, Result | type[Died]]]:
    """Yield every item with its result, each tried once."""
    queue = deque(items)
    workers: dict[Connection[Any, Any], _Worker[Item, Result]] = {}
    others = range(1, min(count, len(queue)))
    try:
        if queue:
            _add(workers, start, 0)
        while workers:
            for ready in wait(list(workers)):
                worker = workers[cast("Connection[Any, Any]", ready)]
                message, finished = worker.receive(), worker.item
                if isinstance(message, DheadsError):
                    raise message
                if message is not Died and queue:
                    worker.give(queue.popleft())
                    for number in others:
                        _add(workers, start, number)
                    others = range(0)
                else:
                    workers.pop(worker.pipe).end()
                    if finished is not None and queue:  # a process that died at its start would do so again
                        _add(workers, start, worker.number)
                if finished is not None:
                    yield finished, cast("Result | type[Died]", message)
        if queue:
            raise DheadsError("the worker processes die as they start; try fewer --workers, they may lack memory")
    finally:
        for worker in workers.values():
            worker.end()


def _add(workers: dict[Connection[Any, Any], _Worker[Item, Result]], start: Start[Item, Result], number: int) -> None:
    worker = _Worker(start, number)
    workers[worker.pipe] = worker


class _Worker(Generic[Item, Result]):
    """One process, seen from the process that started it."""

    def __init__(self, start: Start[Item, Result], number: int) -> None:
        # Spawned, not forked: libraries run threads, which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.number = number
        self.item: Item | None = None  # the current one; None while the process starts
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(start, number, theirs), daemon=True)
        self.process.start()
        theirs.close()  # an open copy here would keep the pipe open after the process's end

    def give(self, item: Item) -> None:
        self.item = item
        try:
            self.pipe.send(item)
        except OSError:  # the process has just died, which the next `receive` finds
            return

    def receive(self) -> Result | DheadsError | type[Died] | None:
        """The next message: None when the process is ready, a result, an error, or Died at the end of the pipe."""
        try:
            return cast("Result | DheadsError | None", self.pipe.recv())
        except (EOFError, OSError):
            return Died

    def end(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join(_END_SECONDS)
        self.process.kill()
        self.process.join()


def _serve(start: Start[Item, Result], number: int, pipe: Connection[Any, Any]) -> None:
    """The main function of a worker process."""
    open_streams()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with ended_cleanly():
            work = start(number)
            pipe.send(None)  # ready
            while True:
                pipe.send(work(pipe.recv()))
    except DheadsError as error:
        pipe.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the first process is gone
        return


def _end_with_parent() -> None:
    """End this process when its parent ends, however that happens."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    undo_all()
    os._exit(1)
