"""Measuring pairs of videos and summing up the results in a report."""

from __future__ import annotations

import difflib
import logging
import platform
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from tqdm import tqdm

from dheads import __version__
from dheads.errors import DheadsError
from dheads.evaluation.catalogue import CATALOGUE, PAPER
from dheads.evaluation.comparison import head_shares
from dheads.evaluation.instruments import Instrument, load_instruments
from dheads.evaluation.pairs import Failures, VideoPair
from dheads.evaluation.parallel import ComparedPair, compare_pairs
from dheads.evaluation.results import ClipReport, Facts, Report
from dheads.system.devices import described, resolve_device

log = logging.getLogger("dheads")
_MAX_NAMED = 5  # clips that a warning names


class Scorer:
    """Takes all measures that are available, or those of `only`. The arguments are those of `evaluate`."""

    def __init__(
        self,
        only: Sequence[str] | None,
        table: str | None,
        size: int | None,
        device: str,
        lip_reader: str | None,
        words: Path | str | None,
        workers: int,
        progress: bool,
    ) -> None:
        """Raises DheadsError for an unknown measure or table, and for a measure of `only` that is not available."""
        self._only, self._table = _checked_measures(only), _checked_table(table)
        self._size, self._device = size, resolve_device(device)
        self._workers, self._progress = workers, progress
        transcripts = Path(words) if words else None
        self._instruments, self._unavailable = load_instruments(only, self._device, lip_reader, transcripts, progress)

    def add(self, instrument: Instrument) -> None:
        """Take the measures of that instrument too, unless others were asked for."""
        if self._only is None or set(instrument.measures) & set(self._only):
            self._instruments.append(instrument)

    def go_without(self, measures: Collection[str], reason: str) -> None:
        """Raises DheadsError if one of the measures was asked for by name."""
        for name in set(measures).intersection(self._only or ()):
            raise DheadsError(f"{name}: {reason}")

    def score(self, pairs: list[VideoPair], failed: Failures, facts: Facts) -> Report:
        """Measure the pairs. `failed` and `facts` become part of the report.

        Raises DheadsError if no pair can be measured.
        """
        clips: list[ClipReport] = []
        notes = _Notes()
        log.info("measure %d videos %s", len(pairs), described(self._device))
        compared = compare_pairs(pairs, self._size, self._workers)
        for clip, result in tqdm(compared, total=len(pairs), desc="eval", unit="clip", disable=not self._progress):
            if isinstance(result, ComparedPair):
                clips.append(self._measured(result, notes))
            else:
                failed.append((clip, result))
        if not clips:
            raise DheadsError(f"none of the {len(failed)} videos could be measured; the last: {failed[-1][1]}")
        means = mean_values(clip.values for clip in clips)
        means |= {name: value for name, value in head_shares(means).items() if name in means}
        totals = [instrument.total() for instrument in self._instruments]
        return Report(
            [replace(clip, values=self._wanted(clip.values)) for clip in clips],
            {"clips": len(clips), "failed": len(failed), **self._wanted(means)}
            | {name: value for values, _ in totals for name, value in values.items()},
            self._unavailable,
            sorted(failed),
            [*notes.lines(len(clips)), *(line for _, lines in totals for line in lines)],
            facts | _software() | {"device": str(self._device)},
            self._table,
        )

    def _measured(self, compared: ComparedPair, notes: _Notes) -> ClipReport:
        files, values = compared.pair.files, dict(compared.comparison.values)
        for what, detail in compared.notes:
            notes.add(what, f"{files.clip}: {detail}")
        for instrument in self._instruments:
            try:
                values |= instrument.measure(compared.pair)
            except DheadsError as error:
                notes.add(f"{', '.join(instrument.measures)} could not be taken", f"{files.clip}: {error}")
        return ClipReport(files.clip, values, compared.comparison.curves, files.generated, files.reference)

    def _wanted(self, values: dict[str, float]) -> dict[str, float]:
        """Those of the values that were asked for."""
        if self._only is None:
            return values
        wanted = {"frames", *self._only}
        return {name: value for name, value in values.items() if name.removeprefix("true_") in wanted}


def _checked_measures(only: Sequence[str] | None) -> list[str] | None:
    for name in only or ():
        if name not in CATALOGUE:
            near = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.0)[0]
            raise DheadsError(f"unknown measure {name!r}; did you mean {near}? All: {', '.join(CATALOGUE)}")
    return list(only) if only else None


def _checked_table(table: str | None) -> str | None:
    if table is not None and table not in PAPER:
        raise DheadsError(f"the paper has no table {table!r}; the known ones are {', '.join(PAPER)}")
    return table


def mean_values(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of every measure over the rows that have it."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in columns.items()}


class _Notes:
    """Warnings about clips, one line for all clips with the same one."""

    def __init__(self) -> None:
        self._clips: dict[str, list[str]] = {}

    def add(self, what: str, clip: str) -> None:
        self._clips.setdefault(what, []).append(clip)

    def lines(self, clips: int) -> list[str]:
        """The warnings; `clips`: how many clips were measured in all."""
        return [
            f"{len(named)} of {clips} clips: {what} "
            f"({'; '.join(named[:_MAX_NAMED])}{'; ...' if named[_MAX_NAMED:] else ''})"
            for what, named in sorted(self._clips.items())
        ]


def _software() -> Facts:
    return {
        "dheads": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "pyav": av.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }
