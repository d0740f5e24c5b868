"""The files of an evaluation, and its table for a terminal."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

from dheads.errors import DheadsError
from dheads.evaluation.catalogue import CATALOGUE
from dheads.evaluation.page import html
from dheads.evaluation.results import Report, figure, finite, rows, systems
from dheads.system.files import complete_or_absent


def write_report(report: Report, folder: Path | str) -> None:
    """Write report.json (all measures with their definitions), clips.csv (a row per clip) and report.html (one page
    that needs no other file). Each file is complete or absent.

    Raises DheadsError if the folder cannot be written.
    """
    folder = Path(folder)
    files = {"report.json": _json, "clips.csv": _csv, "report.html": html}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, render in files.items():
            with complete_or_absent(folder / name) as part:
                # A clip's name can hold bytes that are not UTF-8.
                part.write_text(render(report), encoding="utf-8", errors="replace", newline="")
    except OSError as error:
        raise DheadsError(f"cannot write the report to {folder}: {error.strerror}") from error


def screen_table(report: Report) -> str:
    """A table for a terminal: every measure of the generated clips, of the real ones and of the paper's systems."""
    names = systems(report)
    head = ["measure", "better", "generated", "real clips", *names]
    lines = [
        [row.measure.name, row.measure.better, figure(row.value), figure(row.truth)]
        + [figure(row.paper.get(system)) for system in names]
        for row in rows(report)
    ]
    # The heading has two lines, split at the first space.
    split_head = [[*text.split(" ", 1), ""][:2] for text in head]
    table = [[first for first, _ in split_head], [second for _, second in split_head], *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def as_dict(report: Report) -> dict[str, object]:
    """The report with the definitions of its measures, ready for JSON; NaN and infinity are None."""
    by_name = {row.measure.name: row for row in rows(report)}
    measures = {
        name: asdict(measure)
        | ({"value": row.value, "true_value": row.truth, "clips": row.clips, "paper": row.paper} if row else {})
        | ({"unavailable": report.unavailable[name]} if name in report.unavailable else {})
        for name, measure in CATALOGUE.items()
        if (row := by_name.get(name)) or name in report.unavailable
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
    return {key: _without_nan(value) for key, value in content.items()}


def _without_nan(content: object) -> object:
    """NaN and infinity become None, as JSON does not have them."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_nan(value) for value in content]
    return finite(content) if isinstance(content, float) else content


def _json(report: Report) -> str:
    return json.dumps(as_dict(report), indent=1, allow_nan=False) + "\n"


def _csv(report: Report) -> str:
    known = [column for name in CATALOGUE for column in (name, f"true_{name}")]
    found = {name for clip in report.clips for name in clip.values}
    columns = [name for name in known if name in found] + sorted(found.difference(known))
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["clip", *columns])
    for clip in report.clips:
        values = [finite(clip.values.get(name)) for name in columns]
        table.writerow([clip.clip, *("" if value is None else f"{value:.6g}" for value in values)])
    return text.getvalue()
