"""Links, anchors and pictures of the pages, and the pages that the code names, exist."""

from __future__ import annotations

import re
from collections import Counter
from urllib.parse import unquote

import manual
import pytest
from conftest import ROOT

LINK = re.compile(
    r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)=\"([^\"]+)\"", re.MULTILINE
)


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^(```|~~~).*?^\1", "", manual.text(page), flags=re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """The anchors of the headings, as GitHub makes them: lower case, no punctuation, numbered where they repeat."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", prose(page), re.MULTILINE):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # of a link, its text
        anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", prose(page)))


@pytest.mark.parametrize("page", manual.ALL)
def test_links(page: str) -> None:
    text = re.sub(r"`[^`\n]*`(?!\])", "", prose(page))  # code within a line is no link; the text of a link may be code
    broken = []
    for target in (unquote("".join(groups)) for groups in LINK.findall(text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.relative_to(ROOT).as_posix())):
            broken.append(target)
    assert broken == []


def test_pages_that_the_code_names() -> None:
    files = [ROOT / "weights.toml", ROOT / "pyproject.toml", *sorted((ROOT / "recipes").iterdir())]
    files += [path for folder in ("dheads", "benchmarks", "docs", "tests") for path in (ROOT / folder).rglob("*.py")]
    named = {page for path in files for page in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8"))}
    assert [page for page in sorted(named) if not (ROOT / page).is_file()] == []
    assert "docs/architecture.md" in named


def test_anchors_are_githubs() -> None:
    assert "weights-names-cache-licences" in anchors("docs/cli.md")
    assert "dheadsload" in anchors("docs/python.md")
    assert "arguments-of-sample-and-frames" in anchors("docs/python.md")
