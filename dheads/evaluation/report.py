"""What `dheads eval` found, as files to keep and a page to look at."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jinja2
import numpy as np

from dheads.errors import DheadsError
from dheads.evaluation.catalogue import CATALOGUE, PAPER, Measure
from dheads.media.playback import plays_in_browsers, write_playable
from dheads.system.files import complete_or_absent
from dheads.system.signals import undoing

_FIRST_CLIPS = 12  # of the page's videos; the best and the worst follow
_RANKED_BY = "mouth_correlation"
_MAX_VIDEO_BYTES = 30_000_000  # of all videos in the page, which takes 4/3 of that
_WIDEST_COPY = 256  # px, of videos that no browser plays as they are
_BINS = 20
_TABLES = {"crema": "CREMA", "lrw": "LRW"}
_CURVES = {
    "sharpness": "Sharpness of the mouth region",
    "colour": "Colour of the face",
    "identity_shape": "Distance of the face's shape",
    "mouth_correlation": "Correlation of the mouth's opening",
}


@dataclass(frozen=True)
class ClipReport:
    """One generated video. A measure without a value is absent."""

    clip: str  # its name, the path below its folder without the ending
    values: dict[str, float]  # by measure; those of the real clip alone begin with `true_`
    curves: dict[str, list[float]]  # by name, one value a second
    generated: Path
    reference: Path | None


@dataclass(frozen=True)
class Report:
    """What an evaluation found: plain data."""

    clips: list[ClipReport]
    summary: dict[str, float]  # clips, failed, every measure's mean over clips, and the measures of the whole set
    unavailable: dict[str, str]  # measure -> what is missing and how to get it
    failed: list[tuple[str, str]]  # (clip, reason)
    warnings: list[str]
    facts: dict[str, str | int | float]  # software, machine, checkpoint, split, seed ...
    table: str | None = None  # "crema" or "lrw": whose rows of the paper stand beside


def write_report(report: Report, folder: Path | str) -> None:
    """report.json (all figures with their definitions), clips.csv (a row a clip) and report.html (one page, no other
    file needed: to look at and to pass on). Each file is complete or absent.

    Raises DheadsError when the folder cannot be written.
    """
    folder = Path(folder)
    files = {"report.json": _json, "clips.csv": _csv, "report.html": _html}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, made in files.items():
            with complete_or_absent(folder / name) as part:
                # A clip's name may hold bytes that are no UTF-8.
                part.write_text(made(report), encoding="utf-8", errors="replace", newline="")
    except OSError as error:
        raise DheadsError(f"cannot write the report to {folder}: {error.strerror}") from error


def screen_table(report: Report) -> str:
    """A table for a terminal: every measure of the generated clips, of the real ones, and the paper's rows."""
    systems = _systems(report)
    head = ["measure", "better", "generated", "real clips", *systems]
    lines = [
        [row.measure.name, row.measure.better, figure(row.value), figure(row.truth)]
        + [figure(row.paper.get(system)) for system in systems]
        for row in _rows(report)
    ]
    words = [[*text.split(" ", 1), ""][:2] for text in head]
    table = [[first for first, _ in words], [second for _, second in words], *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


# ---- Figures ----


@dataclass(frozen=True)
class Row:
    """One measure, of the generated clips and beside them."""

    measure: Measure
    value: float | None  # the mean over clips, or that of the whole set
    truth: float | None  # of the real clips
    paper: dict[str, float]  # by system
    clips: int  # that have a value; 0 for a measure of the whole set


def _rows(report: Report) -> list[Row]:
    """The measures that have a value here or in the paper's table, in the catalogue's order."""
    published = PAPER.get(report.table or "", {})
    rows = []
    for name, measure in CATALOGUE.items():
        paper = {system: values[name] for system, values in published.items() if name in values}
        value, truth = _finite(report.summary.get(name)), _finite(report.summary.get(f"true_{name}"))
        if value is not None or truth is not None or paper:
            rows.append(Row(measure, value, truth, paper, sum(name in clip.values for clip in report.clips)))
    return rows


def _systems(report: Report) -> list[str]:
    return list(PAPER.get(report.table or "", {}))


def figure(value: float | None) -> str:
    """A value for people: two decimals, three digits below 1, nothing where there is none."""
    if value is None or not math.isfinite(value):
        return ""
    if value == round(value):
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 or round(value, 2) == value else f"{value:.3g}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# ---- Files for programs ----


def _json(report: Report) -> str:
    return json.dumps(as_dict(report), indent=1, allow_nan=False) + "\n"


def as_dict(report: Report) -> dict:
    """Everything in it with the measures' definitions, ready for JSON."""
    rows = {row.measure.name: row for row in _rows(report)}
    measures = {
        name: asdict(measure)
        | ({"value": row.value, "true_value": row.truth, "clips": row.clips, "paper": row.paper} if row else {})
        | ({"unavailable": report.unavailable[name]} if name in report.unavailable else {})
        for name, measure in CATALOGUE.items()
        if (row := rows.get(name)) or name in report.unavailable
    }
    content = {
        "facts": report.facts,
        "summary": report.summary,
        "table": report.table,
        "measures": measures,
        "unavailable": report.unavailable,
        "warnings": report.warnings,
        "failed": [{"clip": clip, "reason": reason} for clip, reason in report.failed],
        "clips": [
            {
                "clip": clip.clip,
                "generated": str(clip.generated),
                "reference": str(clip.reference) if clip.reference else None,
                "values": clip.values,
                "curves": clip.curves,
            }
            for clip in report.clips
        ],
    }
    return _without_nan(content)


def _without_nan(content: Any) -> Any:
    """NaN and infinity, for which JSON has no word, become None."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_nan(value) for value in content]
    return _finite(content) if isinstance(content, float) else content


def _csv(report: Report) -> str:
    known = [column for name in CATALOGUE for column in (name, f"true_{name}")]
    found = {name for clip in report.clips for name in clip.values}
    columns = [name for name in known if name in found] + sorted(found.difference(known))
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["clip", *columns])
    for clip in report.clips:
        values = [_finite(clip.values.get(name)) for name in columns]
        table.writerow([clip.clip, *("" if value is None else f"{value:.6g}" for value in values)])
    return text.getvalue()


# ---- The page ----


def _html(report: Report) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dheads", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "path": _path}
    rows = _rows(report)
    return environment.get_template("report.html").render(
        report=report,
        clips=len(report.clips),
        table=_TABLES.get(report.table or "", report.table),
        systems=_systems(report),
        published=[row for row in rows if row.paper],
        further=[row for row in rows if not row.paper],
        catalogue=CATALOGUE,
        distributions=list(_distributions(report)),
        charts=list(_charts(report)),
        shown=list(_videos(report)),
    )


@dataclass(frozen=True)
class Distribution:
    """Histograms of one measure over the same bins, in a box 1 wide; each from 0 to 1, the highest of both bars."""

    measure: Measure
    low: float
    high: float
    bars: list[tuple[float, float, int]]  # x, height, number of clips
    true_bars: list[tuple[float, float, int]]
    mean: float  # x
    true_mean: float | None


def _distributions(report: Report) -> Iterator[Distribution]:
    """Of the measures that two clips or more have."""
    for name, measure in CATALOGUE.items():
        values, truth = (_column(report, key) for key in (name, f"true_{name}"))
        if len(values) < 2:
            continue
        both = np.concatenate([values, truth])
        low, high = float(both.min()), float(both.max())
        low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
        counts, true_counts = (np.histogram(part, _BINS, (low, high))[0] for part in (values, truth))
        peak = max(counts.max(), true_counts.max())
        bars, true_bars = (
            [(i / _BINS, float(n / peak), int(n)) for i, n in enumerate(part) if n] for part in (counts, true_counts)
        )
        mean, true_mean = (float((part.mean() - low) / (high - low)) if len(part) else None for part in (values, truth))
        yield Distribution(measure, low, high, bars, true_bars, mean, true_mean)


def _column(report: Report, name: str) -> np.ndarray:
    values = np.array([clip.values[name] for clip in report.clips if name in clip.values])
    return values[np.isfinite(values)]


@dataclass(frozen=True)
class Chart:
    """One curve a clip and their mean, in a box 1 wide and 1 high, y pointing down."""

    title: str
    low: float
    high: float
    seconds: int
    lines: list[tuple[str, list[tuple[float, float]]]]  # clip, points
    mean: list[tuple[float, float]]


def _charts(report: Report) -> Iterator[Chart]:
    names = dict.fromkeys(name for clip in report.clips for name in clip.curves)
    for name in names:
        curves = {clip.clip: np.array(clip.curves[name], float) for clip in report.clips if clip.curves.get(name)}
        seconds = max(map(len, curves.values()), default=0)
        table = np.full((len(curves), seconds), np.nan)
        for row, curve in zip(table, curves.values(), strict=True):
            row[: len(curve)] = np.where(np.isfinite(curve), curve, np.nan)
        found = np.isfinite(table)
        if not found.any():
            continue
        low, high = float(np.nanmin(table)), float(np.nanmax(table))
        low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
        heights = (high - table) / (high - low)
        lines = [(clip, _points(row)) for clip, row in zip(curves, heights, strict=True)]
        # Where most clips have ended, the mean would tell who goes on, not how quality does.
        most = found.sum(axis=0) >= max(1, len(curves) / 2)
        mean = np.where(most, np.nansum(heights, axis=0) / np.maximum(found.sum(axis=0), 1), np.nan)
        yield Chart(_CURVES.get(name, name), low, high, seconds, lines, _points(mean))


def _points(heights: np.ndarray) -> list[tuple[float, float]]:
    """The middles of the seconds that have a value."""
    return [((i + 0.5) / len(heights), float(y)) for i, y in enumerate(heights) if np.isfinite(y)]


def _path(points: list[tuple[float, float]], width: float, height: float) -> str:
    """The SVG path through points of a box 1 wide and 1 high; a single one is a dot."""
    places = [f"{x * width:.1f} {y * height:.1f}" for x, y in points]
    return f"M{' L'.join(places)}" + ("h0" if len(places) == 1 else "") if places else ""


@dataclass(frozen=True)
class Pair:
    """A clip's videos for the page, as data: addresses."""

    clip: ClipReport
    note: str
    generated: str
    real: str | None


def _videos(report: Report) -> Iterator[Pair]:
    """The first clips, the best and the worst, as long as there is room."""
    room = _MAX_VIDEO_BYTES
    for index, note in _selection(report.clips).items():
        clip = report.clips[index]
        generated = _video_bytes(clip.generated)
        real = _video_bytes(clip.reference) if clip.reference else None
        size = len(generated or b"") + len(real or b"")
        if generated is None or size > room:
            continue
        room -= size
        yield Pair(clip, note, _address(generated), _address(real) if real else None)


def _selection(clips: list[ClipReport]) -> dict[int, str]:
    """Which clips to show, by index, with what to say of them."""
    shown = dict.fromkeys(range(min(_FIRST_CLIPS, len(clips))), "")
    ranked = sorted((i for i, clip in enumerate(clips) if _RANKED_BY in clip.values), key=lambda i: _rank(clips[i]))
    if len(ranked) > 1:
        shown |= {ranked[-1]: "the mouth follows best", ranked[0]: "the mouth follows worst"}
    return shown


def _rank(clip: ClipReport) -> float:
    return np.nan_to_num(clip.values[_RANKED_BY], nan=-1.0)


def _video_bytes(path: Path) -> bytes | None:
    """A file that browsers play: the video's own, or a copy where they would not; None where it cannot be read."""
    try:
        if plays_in_browsers(path) and path.stat().st_size <= _MAX_VIDEO_BYTES:
            return path.read_bytes()
        with TemporaryDirectory() as folder, undoing(partial(shutil.rmtree, folder, ignore_errors=True)):
            copy = Path(folder) / "copy.mp4"
            write_playable(path, copy, _WIDEST_COPY)
            return copy.read_bytes()
    except (DheadsError, OSError):
        return None


def _address(video: bytes) -> str:
    return "data:video/mp4;base64," + base64.b64encode(video).decode("ascii")
