"""The log files of a training run: metrics, events, and TensorBoard curves where that is installed.

metrics.jsonl   one JSON object a line: step, losses and other measures, with 6 significant digits
events.jsonl    one JSON object a line: step, kind, message and details of a problem
tensorboard/    the metrics as curves
"""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

from dheads.errors import DheadsError

_LOG = logging.getLogger("dheads")
# The TensorBoard group of a value, by its name.
_TAGS = (
    (re.compile(r"val_(.+)"), r"validation/\1"),
    (re.compile(r"((?:.+_)?q[1-4])"), r"loss_by_timestep/\1"),
    (re.compile(r"(loss|simple|vlb|lip)"), r"loss/\1"),
    (re.compile(r"(lr|grad_.+|bad_steps)"), r"optimiser/\1"),
    (re.compile(r"(.+_per_second|waiting)"), r"speed/\1"),
)


class Journal:
    """The log files of one run, in its folder.

    Opened at a step above 0 it continues the files: rows of later steps, left by a killed run, are dropped, as they
    will be written again. Opened at step 0 it starts them from nothing. A full disk does not end the run: one warning
    is logged, and rows wait in memory until there is room (TensorBoard's curves get a gap).
    """

    def __init__(self, run: Path, step: int) -> None:
        """Raises DheadsError when the files in `run` cannot be opened."""
        self._metrics = _Rows(run / "metrics.jsonl", step)
        self._events = _Rows(run / "events.jsonl", step)
        self._curves = _Curves(run / "tensorboard", step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one row of metrics and a point of each curve; values that are not finite are written as null."""
        self._metrics.add({"step": step, **values})
        self._curves.add(step, values)

    def event(self, step: int, kind: str, message: str, **details: Any) -> None:
        """Write one row of events, and log a warning. `message`: a sentence for people; `details`: for programs."""
        _LOG.warning(message)
        self._events.add({"step": step, "kind": kind, "message": message, **details})

    def close(self) -> None:
        """Write what waits; log a warning for rows that cannot be written."""
        self._metrics.close()
        self._events.close()
        self._curves.close()


class _Rows:
    """A file of JSON lines; on a full disk, rows wait in memory."""

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
            # Unbuffered, so that the part of a row that still fitted on the disk is known; the rest follows later.
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

    Rows are in the order of their steps, so that truncating the file is enough: it needs no room and is atomic.
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
        return 0.0  # not written by this program, so it is kept


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: 6 significant digits, null where not finite, other types as text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


class _Curves:
    """TensorBoard curves; does nothing where TensorBoard is not installed."""

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
                # Hides points from this step on that an earlier run wrote.
                self._writer = self._make(str(self._folder), purge_step=self._next_step)
            for name, value in values.items():
                self._writer.add_scalar(_tag(name), value, step)
            self._next_step, self._warned = step + 1, False
        except OSError as error:
            self._writer = None  # the error ended its thread: the next row opens another one
            if not self._warned:
                _LOG.warning("cannot write to %s: %s; TensorBoard will lack this row", self._folder, error.strerror)
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
