"""The picture of the house in docs/architecture.md: who imports whom, by package.

python docs/house.py           # prints it
python docs/house.py --write   # puts it into docs/architecture.md
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
# From the lowest row to the highest. A module imports from lower rows only; the reference also runs a denoiser.
ROWS = [
    ["errors", "diffusion"],
    ["config", "losses", "system"],
    ["conditioning", "media"],
    ["model", "faces"],
    ["denoiser", "reference", "extensions"],
    ["weights"],
    ["speech"],
    ["dataset", "sampling"],
    ["training", "evaluation"],
    ["cli"],
    ["demo"],
]
WITHIN_A_ROW = {"reference": {"denoiser"}}
JOBS = {
    "errors": "what a user can mend",
    "diffusion": "schedule, q and p, solvers",
    "config": "everything that can be chosen; presets/*.toml",
    "losses": "the paper's losses",
    "system": "files, devices, processes",
    "conditioning": "identity, motion frames, audio window",
    "media": "sound, photos and video, in and out",
    "model": "the paper's U-Net",
    "faces": "detection, landmarks, alignment, paste",
    "denoiser": "network + schedule -> x_0",
    "reference": "the paper's sampling loop",
    "extensions": "beyond the paper, a file an idea",
    "weights": "the list, download, licences, checkpoints",
    "speech": "speech encoders; lips against sound",
    "dataset": "raw corpora -> clips -> memory",
    "sampling": "a face and a recording -> a video",
    "training": "a dataset -> weights",
    "evaluation": "measures, reports, Turing test",
    "cli": "parse, call, print",
    "demo": "a page in the browser",
}


def files_of(name: str) -> list[Path]:
    """The source files of a package, or of a module at the root."""
    package = ROOT / "dheads" / name
    return sorted(package.rglob("*.py")) if package.is_dir() else [package.with_suffix(".py")]


def imported(source: str) -> set[str]:
    """The packages and root modules that a source file imports, at the top or inside a function."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("dheads.")} & JOBS.keys()


def imports_of(name: str) -> set[str]:
    """What a package or root module imports of the others."""
    return set().union(*(imported(path.read_text(encoding="utf-8")) for path in files_of(name))) - {name}


def picture() -> str:
    """Text: the highest row first; each name with its job, and the others that it imports."""
    order = [name for row in ROWS for name in row]
    lines = []
    for row in reversed(ROWS):
        for name in row:
            used = sorted(imports_of(name) - {"errors"}, key=order.index)
            lines.append(f"{name:<13} {JOBS[name]:<46} <- {' '.join(used)}".rstrip(" <-"))
        lines.append("")
    return "\n".join(lines[:-1])


def page_with(text: str) -> str:
    """docs/architecture.md with that picture in its first block of code."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("```text\n")
    return f"{before}```text\n{text}\n```{rest.partition('```')[2]}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page_with(picture()), encoding="utf-8")
    else:
        print(picture())
