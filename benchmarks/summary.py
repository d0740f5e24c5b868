"""The yardstick's summary: every measure as a mean over clips, and of the person for whom it is worst."""

from __future__ import annotations

import math
from dataclasses import dataclass

from networks import ANGLES

from dheads.evaluation.comparison import head_shares
from dheads.evaluation.scoring import mean_values
from dheads.faces.head_pose import POSE

Result = dict[str, dict[str, float]]  # the measures by variant
VARIANTS = {"own": "weights' own motion", "poses": "true poses", "control": "another's sound"}


@dataclass(frozen=True)
class Line:
    """A measure in the summary."""

    title: str
    measure: str
    higher: bool = False  # the worst is the least; otherwise what is farthest from 1
    is_share: bool = False  # of what real clips have: their means are compared, as single clips may hardly move


def _shares(title: str, name: str, parts: tuple[str, ...]) -> list[Line]:
    return [Line(f"{title} of {part}", f"{name}_{part}", is_share=True) for part in parts]


LINES = [
    *_shares("head: range", "head_range", POSE),
    Line("head: range, all six", "head_range"),
    *_shares("head: speed", "head_speed", POSE),
    Line("head: speed, all six", "head_speed"),
    *_shares("head by FSA-Net: range", "net_range", ANGLES),
    *_shares("head by FSA-Net: speed", "net_speed", ANGLES),
    Line("mouth: correlation", "mouth_correlation", higher=True),
    Line("mouth: range", "mouth_range_ratio"),
    Line("mouth: slope", "mouth_slope"),
    Line("mouth: sharpness", "mouth_sharpness"),
    Line("identity by MobileFaceNet", "net_identity", higher=True, is_share=True),
    Line("SSIM", "ssim", higher=True),
]


def summary(results: list[tuple[str, Result]]) -> str:
    """Markdown of results (person, measures by variant) of all clips; shares are of what real clips have."""
    shown = {variant: title for variant, title in VARIANTS.items() if any(result.get(variant) for _, result in results)}
    lines = [
        "| | " + " | ".join(f"{title}: mean | worst person" for title in shown.values()) + " |",
        "|---" * (1 + 2 * len(shown)) + "|",
    ]
    for line in LINES:
        cells = [cell for variant in shown for cell in _cells(line, variant, results)]
        if any(cells):
            lines.append(f"| {line.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(line: Line, variant: str, results: list[tuple[str, Result]]) -> tuple[str, str]:
    """The mean over clips, and the worst person's; empty without a value."""
    mean = value(line, [result.get(variant, {}) for _, result in results])
    by_person = {
        person: value(line, [result.get(variant, {}) for other, result in results if other == person])
        for person in dict.fromkeys(person for person, _ in results)
    }
    known = {person: found for person, found in by_person.items() if math.isfinite(found)}
    if not known:
        return "", ""
    worst = max(known, key=lambda person: _badness(line, known[person]))
    return f"{mean:.2f}", f"{known[worst]:.2f} ({worst})"


def value(line: Line, rows: list[dict[str, float]]) -> float:
    """The measure of several clips; NaN without a value."""
    means = mean_values(rows)
    means |= head_shares(means)
    if line.is_share:
        return means.get(line.measure, math.nan) / means.get(f"true_{line.measure}", math.nan)
    return means.get(line.measure, math.nan)


def _badness(line: Line, found: float) -> float:
    return -found if line.higher else abs(math.log(max(found, 1e-6)))
