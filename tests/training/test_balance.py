"""How often clips are used where examples are balanced by speakers."""

from __future__ import annotations

import dataclasses

import pytest

from dheads.dataset.manifest import Clip
from dheads.training.balance import clip_shares


def clips_of(**counts: int) -> list[Clip]:
    """So many clips of each speaker; speakers whose names begin with `still` have photos."""
    return [
        Clip(f"{speaker}/{i}", speaker, "train", 1 if speaker.startswith("still") else 75, "")
        for speaker, count in counts.items()
        for i in range(count)
    ]


def speaker_shares(clips: list[Clip], still_share: float, cap: float) -> dict[str, float]:
    shares = clip_shares(clips, still_share, cap)
    assert shares.sum() == pytest.approx(1)
    total: dict[str, float] = {}
    for clip, share in zip(clips, shares, strict=True):
        total[clip.speaker] = total.get(clip.speaker, 0) + share
    return total


def test_speakers_count_by_the_root_of_their_clips() -> None:
    shares = speaker_shares(clips_of(a=9, b=4, c=1), 0.0, 1.0)
    assert shares == pytest.approx({"a": 3 / 6, "b": 2 / 6, "c": 1 / 6})
    each = clip_shares(clips_of(a=9, b=4, c=1), 0.0, 1.0)
    assert each[:9] == pytest.approx([3 / 6 / 9] * 9)


def test_no_speaker_gets_more_than_the_cap() -> None:
    assert speaker_shares(clips_of(a=144, b=4, c=1, d=1), 0.0, 0.4) == pytest.approx(
        {"a": 0.4, "b": 0.3, "c": 0.15, "d": 0.15}
    )
    # The excess of one speaker may lift another over the cap.
    assert speaker_shares(clips_of(a=100, b=81, c=1, d=1), 0.0, 0.3) == pytest.approx(
        {"a": 0.3, "b": 0.3, "c": 0.2, "d": 0.2}
    )
    # With a cap that is too low all speakers have the same share.
    assert speaker_shares(clips_of(a=100, b=1), 0.0, 0.25) == pytest.approx({"a": 0.5, "b": 0.5})


def test_stills_get_exactly_their_share() -> None:
    stills = {f"still_{i}": 1 for i in range(5)}
    shares = speaker_shares(clips_of(a=4, b=1, **stills), 0.1, 1.0)
    assert shares == pytest.approx({"a": 0.6, "b": 0.3, **dict.fromkeys(stills, 0.02)})
    assert speaker_shares(clips_of(**stills), 0.1, 0.25) == pytest.approx(dict.fromkeys(stills, 0.2))
    assert speaker_shares(clips_of(a=4), 0.1, 0.25) == pytest.approx({"a": 1})
    assert speaker_shares(clips_of(a=4, **stills), 0.0, 0.25) == pytest.approx({"a": 1, **dict.fromkeys(stills, 0)})


def test_a_speaker_with_photos_and_clips_counts_as_both() -> None:
    clips = [*clips_of(a=4, b=1), Clip("a/photo", "a", "train", 1, "")]
    assert clip_shares(clips, 0.1, 1.0) == pytest.approx([0.6 / 4] * 4 + [0.3, 0.1])


def test_no_folder_of_the_raw_data_gets_more_than_its_cap() -> None:
    folders = {"a": "lab", "b": "lab", "c": "wild", "still": "photos"}
    clips = [
        dataclasses.replace(clip, source=f"{folders[clip.speaker]}/{clip.clip}.mp4")
        for clip in clips_of(a=9, b=1, c=1, still=1)
    ]
    total = dict.fromkeys(folders, 0.0)
    for clip, share in zip(clips, clip_shares(clips, 0.1, 1.0, 0.6), strict=True):
        total[clip.speaker] += share
    # The photo has 0.1; of the rest the speakers have 3 / 5, 1 / 5, 1 / 5 by the roots. The lab's 4 / 5 exceed 0.6.
    assert total == pytest.approx({"a": 0.9 * 0.45, "b": 0.9 * 0.15, "c": 0.9 * 0.4, "still": 0.1})
