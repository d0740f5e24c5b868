"""One process at a time. A lock ends with the process that holds it, however it ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dheads.system.ending import undoing

log = logging.getLogger("dheads")


@contextmanager
def in_turn(path: Path, waiting: str) -> Iterator[None]:
    """The block, after whichever process holds the lock file `path`; `waiting` is said where that takes time."""
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
    """Whether this process is the only one in such a block with the lock file `path`, which is there that long."""
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
            with suppress(OSError):  # Windows removes no file that is open
                path.unlink()
            lock.release()
