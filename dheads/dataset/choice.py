"""Choosing clips of as many speakers as possible."""

from __future__ import annotations

from collections import Counter

from dheads.dataset.manifest import Clip


def alternate_speakers(clips: list[Clip]) -> list[Clip]:
    """The first clip of every speaker, then the second of every speaker, and so on; each round in the list's order."""
    counts: Counter[str] = Counter()
    rounds: list[tuple[int, Clip]] = []
    for clip in clips:
        counts[clip.speaker] += 1
        rounds.append((counts[clip.speaker], clip))
    return [clip for _, clip in sorted(rounds, key=lambda row: row[0])]  # a stable sort


def choose_evenly(clips: list[Clip], count: int) -> list[Clip]:
    """At most `count` clips at even distances in the list: one of each speaker if there are that many speakers.

    Still photos are chosen only from a list without videos.
    """
    moving = [clip for clip in clips if clip.moves] or clips
    # Reversed twice, so that the first clip of each speaker stays.
    firsts = list({clip.speaker: clip for clip in reversed(moving)}.values())[::-1]
    pool = firsts if len(firsts) >= count else moving
    count = min(count, len(pool))
    return [pool[index * len(pool) // count] for index in range(count)]
