"""Which speakers are held out, and that they stay held out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dheads.dataset.manifest import Clip, standing_splits, write_clips
from dheads.dataset.splits import split_speakers
from dheads.errors import DheadsError


def test_about_a_tenth_each_is_held_out_independent_of_other_speakers() -> None:
    speakers = [f"speaker{i}" for i in range(2000)]
    splits = split_speakers(speakers, {})
    counts = Counter(splits.values())
    assert counts["val"] == pytest.approx(200, abs=50)
    assert counts["test"] == pytest.approx(200, abs=50)
    assert list(splits) == speakers
    some = speakers[::7]
    assert split_speakers(reversed(some), {}) == {speaker: splits[speaker] for speaker in some}


def test_no_speaker_moves_when_a_corpus_grows() -> None:
    """In 200 corpora of thirty speakers that three join, no held-out speaker moves to the training set."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        names = [f"s{number}" for number in rng.choice(100_000, 33, replace=False)]
        before = split_speakers(names[:30], {})
        after = split_speakers(names, before)
        assert {name: after[name] for name in names[:30]} == before
        alone = split_speakers(names, {})
        moved = [name for name in names[:30] if before[name] != "train" and alone[name] == "train"]
        assert len(moved) <= 1, "without the table, at most the one who filled an empty split"


@pytest.mark.parametrize(("count", "empty"), [(1, {"val", "test"}), (2, {"val", "test"}), (3, set()), (9, set())])
def test_few_speakers_fill_every_split_that_they_can(count: int, empty: set[str]) -> None:
    for corpus in range(50):
        splits = split_speakers([f"{corpus}-{i}" for i in range(count)], {})
        assert {"train", "val", "test"} - set(splits.values()) == empty


def test_new_speakers_alone_fill_an_empty_split() -> None:
    standing = dict.fromkeys("abcdef", "train")
    assert split_speakers("abcdef", standing) == standing
    grown = split_speakers("abcdefxyz", standing)
    assert {name: grown[name] for name in "abcdef"} == standing
    assert {"val", "test"} <= {grown[name] for name in "xyz"}


def test_earlier_splits_are_read_from_the_tables(tmp_path: Path) -> None:
    assert standing_splits(tmp_path / "absent") == {}
    write_clips(tmp_path, [Clip("a/1", "a", "val", 3, "a/1.mp4")], (1, 3))
    write_clips(tmp_path, [Clip("b/1", "b", "train", 3, "b/1.mp4")], (3, 3))
    assert standing_splits(tmp_path) == {"a": "val", "b": "train"}, "of the shards that are there"
    (tmp_path / "clips.csv").write_text("no table\n1,2\n")
    with pytest.raises(DheadsError, match=r"clips\.csv: cannot be read"):
        standing_splits(tmp_path)
