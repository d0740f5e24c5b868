"""Pairing videos by name."""

from __future__ import annotations

from pathlib import Path

from dheads.evaluation.pairs import find_pairs


def test_names_are_paths_below_the_folder(tmp_path: Path) -> None:
    for path in ("a/speaker/one.mp4", "a/two.mov", "b/speaker/one.avi", "b/one.mp4"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    pairs, failed = find_pairs(tmp_path / "a", tmp_path / "b")
    assert pairs == [("speaker/one", tmp_path / "a/speaker/one.mp4", tmp_path / "b/speaker/one.avi", None)]
    assert [name for name, _ in failed] == ["two"]
