"""What a run of `dheads train` tells while it goes on: metrics, events, and TensorBoard where that is installed.

metrics.jsonl   one JSON object a line: step, losses and whatever else was measured, 6 significant digits
events.jsonl    one JSON object a line: step, kind, message and details of what did not go as it should
tensorboard/    the metrics again, as curves
"""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dheads.errors import DheadsError

_LOG = logging.getLogger("dheads")
# The group of curves that a value belongs to, by its name.
_TAGS = (
    (re.compile(r"val_(.+)"), r"validation/\1"),
    (re.compile(r"((?:.+_)?q[1-4])"), r"loss_by_timestep/\1"),
    (re.compile(r"(loss|simple|vlb|lip)"), r"loss/\1"),
    (re.compile(r"(lr|grad_.+|bad_steps)"), r"optimiser/\1"),
    (re.compile(r"(.+_per_second|waiting)"), r"speed/\1"),
)


class Journal:
    """The records of one run, in its folder.

    Opened at a step above 0 it goes on from there: rows of later steps, which a killed run left, are dropped, as they
    will come again. At step 0 it starts anew. A full disk never ends the run: it is warned of once, and rows wait in
    memory until there is room (TensorBoard's curves get a gap).
    """

    def __init__(self, run: Path, step: int) -> None:
        """Raises DheadsError when the files in `run` cannot be opened."""
        self._metrics = _Rows(run / "metrics.jsonl", step)
        self._events = _Rows(run / "events.jsonl", step)
        self._curves = _Curves(run / "tensorboard", step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One row of metrics, and a point of every curve; values that are not finite are written as null."""
        self._metrics.add({"step": step, **values})
        self._curves.add(step, values)

    def event(self, step: int, kind: str, message: str, **details: Any) -> None:
        """One row of events, and a warning in the log. `message`: a sentence for people; `details`: for programs."""
        _LOG.warning(message)
        self._events.add({"step": step, "kind": kind, "message": message, **details})

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
        self._curves.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Rows:
    """A file of JSON lines that a full disk only delays."""

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._waiting, self._warned = path, bytearray(), False
        try:
            _cut(path, step)
        except OSError as error:
            raise DheadsError(f"cannot write {path}: {error.strerror}; choose another --out") from error

    def add(self, row: dict[str, Any]) -> None:
        self._waiting += json.dumps(_plain(row), allow_nan=False).encode() + b"\n"
        self._flush()

    def close(self) -> None:
        self._flush()
        if self._waiting:
            _LOG.warning("%s: lost its last %d rows", self._path, self._waiting.count(b"\n"))

    def _flush(self) -> None:
        try:
            # Unbuffered: what a filling disk still takes of a row is known, and the rest of it follows later.
            with self._path.open("ab", buffering=0) as file:
                while self._waiting:
                    del self._waiting[: file.write(self._waiting)]
            self._warned = False
        except OSError as error:
            if not self._warned:
                _LOG.warning("cannot write %s: %s; its rows wait until it can be written", self._path, error.strerror)
            self._warned = True


def _cut(path: Path, step: int) -> None:
    """Cut off the rows after `step` and a half-written last row; all of them for step 0.

    Rows lie in the order of their steps, so that shortening the file is enough: it needs no room and cannot be caught
    halfway.
    """
    with path.open("a+b") as file:
        file.seek(0)
        size = 0
        for line in file if step > 0 else ():
            if not line.endswith(b"\n") or _step(line) > step:
                break
            size += len(line)
        file.truncate(size)


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0.0  # not a row of ours, so not ours to drop


def _plain(value: Any) -> Any:
    """As JSON can hold it: 6 significant digits, null for what is not finite, text for what JSON does not know."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


class _Curves:
    """TensorBoard, where that is installed; else nothing."""

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, self._next_step, self._warned = folder, step + 1 if step > 0 else 0, False
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._make = None
        else:
            self._make = SummaryWriter

    def add(self, step: int, values: dict[str, float]) -> None:
        if self._make is None:
            return
        try:
            if self._writer is None:
                # What an earlier run drew from this step on is hidden.
                self._writer = self._make(str(self._folder), purge_step=self._next_step)
            for name, value in values.items():
                self._writer.add_scalar(_tag(name), value, step)
            self._next_step, self._warned = step + 1, False
        except OSError as error:
            self._writer = None  # its thread ended with the error: the next row gets a new one
            if not self._warned:
                _LOG.warning("cannot write to %s: %s; TensorBoard will lack this", self._folder, error.strerror)
            self._warned = True

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            _LOG.warning("cannot write to %s: %s", self._folder, error.strerror)
        self._writer = None


def _tag(name: str) -> str:
    for pattern, tag in _TAGS:
        if match := pattern.fullmatch(name):
            return match.expand(tag)
    return f"run/{name}"
