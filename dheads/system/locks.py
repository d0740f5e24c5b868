"""Locks between processes, by files. A lock is released when its process ends, however it ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dheads.system.signals import undoing

log = logging.getLogger("dheads")


@contextmanager
def in_turn(path: Path, waiting: str) -> Iterator[None]:
    """Wait for the lock file `path`, and hold it for the block. `waiting` is logged where another process holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info(waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` for the block and then delete it; yields False where another process holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    with undoing(lambda: path.unlink(missing_ok=True)):
        try:
            yield True
        finally:
            with suppress(OSError):  # Windows deletes no file that is open
                path.unlink()
            lock.release()
