"""The results of an evaluation as plain data, and its measures next to those of the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dheads.evaluation.catalogue import CATALOGUE, PAPER, Measure

Facts = dict[str, str | int | float]


@dataclass(frozen=True)
class ClipReport:
    """The measures of one generated video. Measures without a value are absent."""

    clip: str  # name: the path below its folder, without the suffix
    values: dict[str, float]  # by measure; keys with the prefix `true_`: of the real clip alone
    curves: dict[str, list[float]]  # by name, one value per second
    generated: Path
    reference: Path | None


@dataclass(frozen=True)
class Report:
    """The results of an evaluation."""

    clips: list[ClipReport]
    summary: dict[str, float]  # clips, failed, the mean of every measure over clips, and the measures of the whole set
    unavailable: dict[str, str]  # measure -> what is missing and how to get it
    failed: list[tuple[str, str]]  # (clip, reason)
    warnings: list[str]
    facts: Facts  # software, machine, checkpoint, split, seed ...
    table: str | None = None  # "crema" or "lrw": the table of the paper to compare with


@dataclass(frozen=True)
class Row:
    """One measure of the generated clips, of the real ones and of the paper's systems."""

    measure: Measure
    value: float | None  # mean over clips, or of the whole set
    truth: float | None  # of the real clips
    paper: dict[str, float]  # by system
    clips: int  # number of clips with a value; 0 for a measure of the whole set


def rows(report: Report) -> list[Row]:
    """The measures with a value in the report or in the paper's table, in the order of the catalogue."""
    published = PAPER.get(report.table or "", {})
    found = []
    for name, measure in CATALOGUE.items():
        paper = {system: values[name] for system, values in published.items() if name in values}
        value, truth = finite(report.summary.get(name)), finite(report.summary.get(f"true_{name}"))
        if value is not None or truth is not None or paper:
            found.append(Row(measure, value, truth, paper, sum(name in clip.values for clip in report.clips)))
    return found


def systems(report: Report) -> list[str]:
    """The systems of the paper's table."""
    return list(PAPER.get(report.table or "", {}))


def figure(value: float | None) -> str:
    """A value as text: two decimals, three significant digits below 1, empty for None and NaN."""
    if value is None or not math.isfinite(value):
        return ""
    if value == round(value):
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 or round(value, 2) == value else f"{value:.3g}"


def finite(value: float | None) -> float | None:
    """The value; None for NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None
