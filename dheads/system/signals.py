"""Signals that end the program: work in progress is undone first, or finished first."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

# The signals that end a program and that it can catch, except those of its own faults (SIGSEGV ...), which would
# recur at once, and those that Python turns into exceptions (SIGPIPE, SIGXFSZ).
_NAMES = ["HUP", "INT", "QUIT", "ABRT", "TERM", "USR1", "USR2", "ALRM", "VTALRM", "PROF", "XCPU", "IO", "PWR", "STKFLT"]
if sys.platform == "win32":  # it cannot delete open files, so Ctrl-C stays an exception
    _NAMES = ["TERM"]
SIGNALS = [getattr(signal, f"SIG{name}") for name in _NAMES if hasattr(signal, f"SIG{name}")]

_undo_steps: list[Callable[[], object]] = []
log = logging.getLogger("dheads")


# --- Undo and end


@contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Register `undo`, which must be quick, to be called where a signal ends the program within the block.

    It is not called where the block is left, normally or by an exception: that is up to the caller.
    """
    _undo_steps.append(undo)
    try:
        yield
    finally:
        _undo_steps.remove(undo)


def undo_all() -> None:
    """Call everything registered by `undoing` in this process, the latest first."""
    for undo in reversed(_undo_steps):
        with suppress(OSError):
            undo()


@contextmanager
def ended_cleanly() -> Iterator[None]:
    """Within the block, a signal undoes the work in progress and ends the program with exit code 128 + its number.

    Signals that are ignored, as Ctrl-C in a shell's background jobs, stay ignored.
    """
    # Not by an exception: one raised within a library's callback would be lost.
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


# --- Finish and end


class Ending:
    """Delays the first SIGTERM, SIGHUP or Ctrl-C within its block, so that the current step can be finished and saved.

    The signal takes effect when the block ends, a second one at once. Ignored signals stay ignored.
    """

    def __init__(self) -> None:
        self.asked = False  # whether a signal has come
        self._signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
            for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self.asked:
            signal.raise_signal(self._signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self._signal = number
            self.__exit__()
        log.warning("ending after this step; once more to end at once, without saving")
        self.asked, self._signal = True, number
