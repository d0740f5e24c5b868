"""What benchmarks/on_gpu.py measured, as the rows of docs/speed.md.

python benchmarks/gpu_table.py out
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Row = dict[str, Any]


def main(out: Annotated[Path, typer.Argument(help="The folder that on_gpu.py wrote.")]) -> None:
    """Print Markdown."""
    steps = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))}
    for name, step in steps.items():
        if step["exit_code"] != 0:
            print(f"The step `{name}` did not come to its end: below is what it had done by then.\n")
    if compiled := steps.pop("compiled", None):  # rows of the same table
        steps.setdefault("sampling", {"rows": []})["rows"] += compiled["rows"]
    for name in filter(steps.get, TABLES):
        print("\n".join(TABLES[name](steps[name]["rows"])) + "\n")


def card(rows: list[Row]) -> list[str]:
    values: Row = {name: value for row in rows for name, value in row.items()}
    peak = values.get("peak_flops_per_second")
    text = f"{values['machine']}; torch {values['torch']}, CUDA {values['cuda']}, cuDNN {values['cudnn']}"
    return [text + (f"; matrix products at {peak / 1e12:.4g} TFLOP/s" if peak else "") + "."]


def correctness(rows: list[Row]) -> list[str]:
    outcomes = [row["outcome"] for row in rows]
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in sorted(set(outcomes)))
    bad = [f"- `{row['test']}` {row['outcome']}" for row in rows if row["outcome"] != "passed"]
    return [f"Tests that are marked `gpu`: {counts}.", *bad]


def sampling(rows: list[Row]) -> list[str]:
    """Ratios are to the plain way in 100 steps of the same network, as the released code samples."""
    plain = {row["network"]: row for row in rows if row["way"] == "plain"}  # the last one: the most steps
    head = ["network", "way", "steps", "videos", "frames/s", "share of the peak", "ratio", "first frame, s", "MiB"]
    lines = table(head)
    for row in rows:
        speed, base = row.get("frames_per_second"), plain.get(row["network"])
        ratio = speed / base["frames_per_second"] if speed and base else None
        cells = [
            row["network"],
            row["way"],
            row.get("steps"),
            row.get("videos"),
            speed,
            percent(row.get("share_of_peak")),
        ]
        lines.append(line([*cells, ratio, row.get("seconds_to_first_frame"), row.get("memory_mib")]))
    return lines


def training(rows: list[Row]) -> list[str]:
    lines = table(["preset", "way", "batch", "examples/s", "share of the peak", "ratio", "waiting for data", "GiB"])
    for row in rows:
        memory = row["memory_bytes"] / 2**30 if row["memory_bytes"] else None
        cells = [
            row["preset"],
            row["way"],
            row["batch_size"],
            row["examples_per_second"],
            percent(row["share_of_peak"]),
        ]
        lines.append(line([*cells, row["ratio"], percent(row["waiting"]), memory]))
    return lines


def long(rows: list[Row]) -> list[str]:
    return [
        f"{row['long_minutes']:g} minutes of speech: {row['memory_mib_after_first_tenth']:.0f} MiB after the first "
        f"tenth, {row['memory_mib_at_the_end']:.0f} at the end; {row['frames_per_second_first_tenth']:.4g} and "
        f"{row['frames_per_second_last_tenth']:.4g} frames a second."
        for row in rows
    ]


def prepare(rows: list[Row]) -> list[str]:
    return [
        f"`dheads prepare` ({row['landmarks']}): {row['clips_per_second']:.3g} clips of 3 s a second." for row in rows
    ]


TABLES = {
    "card": card,
    "correctness": correctness,
    "sampling": sampling,
    "training": training,
    "long": long,
    "prepare": prepare,
}


def table(head: list[str]) -> list[str]:
    return [line(head), "|" + "---|" * len(head)]


def line(cells: list[Any]) -> str:
    texts = ("" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
    return f"| {' | '.join(texts)} |"


def percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


if __name__ == "__main__":
    typer.run(main)
