"""Choosing clips of as many speakers as possible."""

from __future__ import annotations

from dheads.dataset.choice import alternate_speakers, choose_evenly
from dheads.dataset.manifest import Clip


def clips(*names: str, frames: int = 25) -> list[Clip]:
    """Clips whose speaker is the first letter of their name."""
    return [Clip(name, name[0], "val", frames, "") for name in names]


def names(chosen: list[Clip]) -> list[str]:
    return [clip.clip for clip in chosen]


def test_speakers_alternate_in_the_lists_order() -> None:
    assert names(alternate_speakers(clips("a1", "a2", "a3", "b1", "c1", "c2"))) == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert alternate_speakers([]) == []


def test_one_clip_of_each_speaker_if_there_are_enough_speakers() -> None:
    several = clips("a1", "a2", "b1", "c1", "c2", "d1")
    assert names(choose_evenly(several, 4)) == ["a1", "b1", "c1", "d1"]
    assert names(choose_evenly(several, 2)) == ["a1", "c1"]
    assert names(choose_evenly(several, 5)) == ["a1", "a2", "b1", "c1", "c2"]
    assert names(choose_evenly(several, 9)) == names(several)
    assert choose_evenly(several, 0) == choose_evenly([], 3) == []


def test_photos_are_chosen_only_where_nothing_moves() -> None:
    photos = clips("a1", "b1", frames=1)
    assert [clip.moves for clip in photos] == [False, False]
    assert names(choose_evenly([*photos, *clips("c1")], 2)) == ["c1"]
    assert names(choose_evenly(photos, 2)) == ["a1", "b1"]
