"""Splits by speaker: which speakers are held out. A speaker keeps an earlier split, however the corpus grows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

SPLITS = ("train", "val", "test")
HELD_OUT = {"val": 0.1, "test": 0.1}  # shares of the speakers


def split_speakers(
    speakers: Iterable[str], standing: Mapping[str, str], held_out: Mapping[str, float] = HELD_OUT
) -> dict[str, str]:
    """The split of each speaker, by the hash of the name alone, independent of all other speakers.

    standing: the earlier splits of speakers, which they keep. held_out: the share of each split except train. With at
    least as many speakers as splits, speakers without an earlier split are moved to splits that would be empty.
    """
    speakers, wanted = list(speakers), ["train", *held_out]
    standing = {speaker: split for speaker, split in standing.items() if split in wanted}
    if len(speakers) < len(wanted):
        return {speaker: standing.get(speaker, "train") for speaker in speakers}
    splits = {speaker: standing.get(speaker) or _by_hash(speaker, held_out) for speaker in speakers}
    movable = hash_order(speaker for speaker in speakers if speaker not in standing)
    for split in wanted:
        counts = Counter(splits.values())
        largest = max(wanted, key=lambda other: counts[other])
        first = next((speaker for speaker in movable if splits[speaker] == largest), None)
        if counts[split] == 0 and counts[largest] > 1 and first is not None:
            splits[first] = split
    return splits


def hash_order(speakers: Iterable[str]) -> list[str]:
    """Speakers in the order of their hashes, which, unlike their numbers in a corpus, are unrelated to age or sex."""
    return sorted(speakers, key=_hash)


def _hash(speaker: str) -> int:
    return int.from_bytes(hashlib.sha256(speaker.encode()).digest()[:8], "big")


def _by_hash(speaker: str, held_out: Mapping[str, float]) -> str:
    position, end = _hash(speaker) / 2**64, 0.0
    for split, share in held_out.items():
        end += share
        if position < end:
            return split
    return "train"
