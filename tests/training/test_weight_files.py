"""The weights files in a run folder: second names, and which are kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dheads.errors import DheadsError
from dheads.training import weight_files
from dheads.training.weight_files import numbered, prune, publish


def test_publish_gives_a_file_another_name(tmp_path: Path) -> None:
    one, two, target = numbered(tmp_path, 5000), numbered(tmp_path, 12_345_678), tmp_path / "weights.safetensors"
    assert one.name == "weights-0005000.safetensors"
    for source, content in ((one, b"one"), (two, b"two"), (two, b"two")):
        source.write_bytes(content)
        publish(source, target)
        assert target.read_bytes() == content
        assert os.path.samefile(source, target)
    assert sorted(tmp_path.iterdir()) == [one, two, target]


def test_publish_copies_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*paths: object) -> None:
        raise PermissionError

    monkeypatch.setattr(weight_files.os, "link", refused)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"one")
    publish(source, target)
    source.write_bytes(b"other")
    assert target.read_bytes() == b"one"
    with pytest.raises(DheadsError, match=r"cannot write .*b: No such file"):
        publish(tmp_path / "absent", target)
    assert target.read_bytes() == b"one"
    assert sorted(tmp_path.iterdir()) == [source, target]


@pytest.mark.parametrize(("keep", "left"), [(2, [900, 10_000_000]), (1, [10_000_000]), (0, []), (9, [100, 900, 10**7])])
def test_the_last_ones_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    """By number, not by name; those of later steps are from an earlier run."""
    for step in (100, 900, 10_000_000, 20_000_000):
        numbered(tmp_path, step).touch()
    others = [tmp_path / name for name in ("best.safetensors", "weights.safetensors", "weights-mine.safetensors")]
    for path in others:
        path.touch()
    prune(tmp_path, 10_000_000, keep)
    assert sorted(tmp_path.iterdir()) == sorted([*others, *(numbered(tmp_path, step) for step in left)])
