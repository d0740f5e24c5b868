"""The end of the program by a signal: what is under way is undone first."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# Those that end a program and that a program may catch, but for its own faults (SIGSEGV ...), which come back at once,
# and those that Python turns into errors (SIGPIPE, SIGXFSZ).
_NAMES = ["HUP", "INT", "QUIT", "ABRT", "TERM", "USR1", "USR2", "ALRM", "VTALRM", "PROF", "XCPU", "IO", "PWR", "STKFLT"]
if sys.platform == "win32":  # which deletes no file that is open: Ctrl-C stays an exception
    _NAMES = ["TERM"]
SIGNALS = [getattr(signal, f"SIG{name}") for name in _NAMES if hasattr(signal, f"SIG{name}")]

_undoings: list[Callable[[], object]] = []


@contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Has `undo` called where the program ends within the block without leaving it: it should be quick.

    What is left to do where the block ends, well or not, is the caller's.
    """
    _undoings.append(undo)
    try:
        yield
    finally:
        _undoings.remove(undo)


def undo_all() -> None:
    """Undo what is under way in this process, the last first."""
    for undo in reversed(_undoings):
        with suppress(OSError):
            undo()


@contextmanager
def ended_cleanly() -> Iterator[None]:
    """A signal ends the program within the block at once, with exit code 128 + its number, and what is under way is
    undone. One that is ignored, as Ctrl-C in a shell's background, stays so.

    Not by an exception: one that is raised within a callback of a library is lost.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in ours:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _end(number: int, frame: FrameType | None) -> None:
    undo_all()
    os._exit(128 + number)
