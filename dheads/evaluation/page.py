"""report.html: the results of an evaluation as one page with charts and videos."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import jinja2
import numpy as np

from dheads.errors import DheadsError
from dheads.evaluation.catalogue import CATALOGUE, Measure
from dheads.evaluation.results import ClipReport, Report, figure, rows, systems
from dheads.media.playback import plays_in_browsers, write_playable
from dheads.system.signals import undoing

_FIRST_CLIPS = 12  # shown in any case; the best and the worst follow
_RANKED_BY = "mouth_correlation"
_MAX_VIDEO_BYTES = 30_000_000  # of all videos in the page, in which base64 takes 4/3 of that
_MAX_COPY_SIDE = 256  # px, of copies of videos that no browser plays
_BINS = 20
_TABLES = {"crema": "CREMA", "lrw": "LRW"}
_CURVES = {
    "sharpness": "Sharpness of the mouth region",
    "colour": "Colour of the face",
    "identity_shape": "Distance of the face's shape",
    "mouth_correlation": "Correlation of the mouth's opening",
}
Points = list[tuple[float, float]]  # x and y in a box 1 wide and 1 high, y pointing down


def html(report: Report) -> str:
    """The page, with all its videos as data URLs."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dheads", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "path": _path}
    all_rows = rows(report)
    return environment.get_template("report.html").render(
        report=report,
        clips=len(report.clips),
        table=_TABLES.get(report.table or "", report.table),
        systems=systems(report),
        published=[row for row in all_rows if row.paper],
        further=[row for row in all_rows if not row.paper],
        catalogue=CATALOGUE,
        distributions=list(_distributions(report)),
        charts=list(_charts(report)),
        shown=list(shown_clips(report)),
    )


# ---- Distributions ----


@dataclass(frozen=True)
class Distribution:
    """Histograms of one measure of the generated and the real clips over the same bins, in a box 1 wide.

    Heights go from 0 to 1, the highest bar of both.
    """

    measure: Measure
    low: float
    high: float
    bars: list[tuple[float, float, int]]  # x, height, number of clips
    true_bars: list[tuple[float, float, int]]
    mean: float  # x
    true_mean: float | None


def _distributions(report: Report) -> Iterator[Distribution]:
    """One for each measure with a value for two or more clips."""
    for name, measure in CATALOGUE.items():
        values, truth = (_column(report, key) for key in (name, f"true_{name}"))
        if len(values) < 2:
            continue
        both = np.concatenate([values, truth])
        low, high = _range(both)
        counts, true_counts = (np.histogram(part, _BINS, (low, high))[0] for part in (values, truth))
        peak = max(counts.max(), true_counts.max())
        bars, true_bars = (
            [(i / _BINS, float(n / peak), int(n)) for i, n in enumerate(part) if n] for part in (counts, true_counts)
        )
        mean = float((values.mean() - low) / (high - low))
        true_mean = float((truth.mean() - low) / (high - low)) if len(truth) else None
        yield Distribution(measure, low, high, bars, true_bars, mean, true_mean)


def _column(report: Report, name: str) -> np.ndarray:
    values = np.array([clip.values[name] for clip in report.clips if name in clip.values])
    column: np.ndarray = values[np.isfinite(values)]
    return column


def _range(values: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest value, not counting NaN; 1 apart if they are equal."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


# ---- Charts ----


@dataclass(frozen=True)
class Chart:
    """One curve per clip, and their mean."""

    title: str
    low: float
    high: float
    seconds: int
    lines: list[tuple[str, Points]]  # clip, points
    mean: Points


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
        low, high = _range(table)
        heights = (high - table) / (high - low)
        lines = [(clip, _points(row)) for clip, row in zip(curves, heights, strict=True)]
        # Once most clips have ended, a change of the mean would show which clips remain, not their quality.
        most = found.sum(axis=0) >= max(1, len(curves) / 2)
        mean = np.where(most, np.nansum(heights, axis=0) / np.maximum(found.sum(axis=0), 1), np.nan)
        yield Chart(_CURVES.get(name, name), low, high, seconds, lines, _points(mean))


def _points(heights: np.ndarray) -> Points:
    """A point in the middle of each second that has a value."""
    return [((i + 0.5) / len(heights), float(y)) for i, y in enumerate(heights) if np.isfinite(y)]


def _path(points: Points, width: float, height: float) -> str:
    """The SVG path through points, scaled to (width, height); a single point is a dot."""
    coordinates = [f"{x * width:.1f} {y * height:.1f}" for x, y in points]
    return f"M{' L'.join(coordinates)}" + ("h0" if len(coordinates) == 1 else "") if coordinates else ""


# ---- Videos ----


@dataclass(frozen=True)
class ShownClip:
    """A clip with its videos as data URLs."""

    clip: ClipReport
    note: str
    generated: str
    real: str | None


def shown_clips(report: Report) -> Iterator[ShownClip]:
    """The first clips, the best and the worst, as far as their videos fit into the page."""
    room = _MAX_VIDEO_BYTES
    for index, note in selection(report.clips).items():
        clip = report.clips[index]
        generated = _video_bytes(clip.generated)
        real = _video_bytes(clip.reference) if clip.reference else None
        size = len(generated or b"") + len(real or b"")
        if generated is None or size > room:
            continue
        room -= size
        yield ShownClip(clip, note, _data_url(generated), _data_url(real) if real else None)


def selection(clips: list[ClipReport]) -> dict[int, str]:
    """The indices of the clips to show, each with a note on why."""
    shown = dict.fromkeys(range(min(_FIRST_CLIPS, len(clips))), "")
    ranked = sorted((i for i, clip in enumerate(clips) if _RANKED_BY in clip.values), key=lambda i: _rank(clips[i]))
    if len(ranked) > 1:
        shown |= {ranked[-1]: "the mouth follows best", ranked[0]: "the mouth follows worst"}
    return shown


def _rank(clip: ClipReport) -> float:
    return float(np.nan_to_num(clip.values[_RANKED_BY], nan=-1.0))


def _video_bytes(path: Path) -> bytes | None:
    """A file that browsers play: the video itself, or a copy if they would not; None if it cannot be read."""
    try:
        if plays_in_browsers(path) and path.stat().st_size <= _MAX_VIDEO_BYTES:
            return path.read_bytes()
        with TemporaryDirectory() as folder, undoing(partial(shutil.rmtree, folder, ignore_errors=True)):
            copy = Path(folder) / "copy.mp4"
            write_playable(path, copy, _MAX_COPY_SIDE)
            return copy.read_bytes()
    except (DheadsError, OSError):
        return None


def _data_url(video: bytes) -> str:
    return "data:video/mp4;base64," + base64.b64encode(video).decode("ascii")
