"""Measures that need more than the packaged networks, each behind the same few words; and which of them are at hand.

An instrument looks at one pair of videos after another. What it cannot say of a pair it says in a DheadsError; what it
can only say of the whole set it keeps until asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from dheads.errors import DheadsError
from dheads.evaluation.comparison import Pair
from dheads.evaluation.frechet import (
    CLIP_FRAMES,
    I3D_DIM,
    INCEPTION_DIM,
    Gaussian,
    frechet_distance,
    load_i3d,
    load_inception,
    too_few,
)
from dheads.evaluation.lipreading import LipReader, load_lip_reader, read_words, spoken_words, word_error_rate
from dheads.evaluation.recognition import Recogniser, load_recogniser, similarity
from dheads.evaluation.syncnet import SyncNet, face_crops, load_syncnet, sync
from dheads.media.sound import load_waveform
from dheads.weights.fetching import cached
from dheads.weights.listing import home, known

_FRAMES_AT_ONCE = CLIP_FRAMES  # of the FVD; a batch of the FID


class Instrument(ABC):
    """Measures that are taken together."""

    measures: tuple[str, ...]

    @abstractmethod
    def look(self, pair: Pair) -> dict[str, float]:
        """The measures of one pair. Raises DheadsError where it has none."""

    def total(self) -> tuple[dict[str, float], list[str]]:
        """The measures of all pairs so far together, and what a reader must know of them."""
        return {}, []


# ---- The instruments ----


class SyncMeter(Instrument):
    """Whether lips and sound agree."""

    measures = ("av_offset", "av_confidence", "av_distance")

    def __init__(self, net: SyncNet) -> None:
        self._net = net

    def look(self, pair: Pair) -> dict[str, float]:
        values: dict[str, float] = {}
        for prefix, video, path in pair.sides():
            sound = load_waveform(path).numpy() * 32768  # to int16 units
            found = sync(self._net, face_crops(video.read(), video.landmarks), sound)
            figures = (found.offset, found.confidence, found.distance)
            values |= {f"{prefix}{name}": figure for name, figure in zip(self.measures, figures, strict=True)}
        return values


class IdentityMeter(Instrument):
    """Whether the face stays that of the real clip's first frame."""

    measures = ("identity_similarity",)

    def __init__(self, recogniser: Recogniser) -> None:
        self._recogniser = recogniser

    def look(self, pair: Pair) -> dict[str, float]:
        first = int(pair.reference.seen.argmax())
        identity = next(islice(pair.reference.read(), first, None)), pair.reference.landmarks[first]
        return {
            f"{prefix}identity_similarity": float(
                np.nanmean(similarity(self._recogniser, video.read(), video.landmarks, *identity))
            )
            for prefix, video, _ in pair.sides()
        }


class FrechetMeter(Instrument):
    """The distance of all generated frames, or short clips, from the real ones."""

    def __init__(self, name: str, features: Callable[[np.ndarray], np.ndarray], dim: int) -> None:
        """features: of (F, H, W, 3) uint8 frames, (N, dim)."""
        self.measures = (name,)
        self._features, self._dim = features, dim
        self._seen = Gaussian(), Gaussian()

    def look(self, pair: Pair) -> dict[str, float]:
        # Both before either is taken in, so that a video that fails has no part in the distance.
        found = [self._of(video.read()) for _, video, _ in pair.sides()]
        for gaussian, features in zip(self._seen, found, strict=True):
            gaussian.add(features)
        return {}

    def _of(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        waiting = iter(frames)
        batches = iter(lambda: list(islice(waiting, _FRAMES_AT_ONCE)), [])
        return np.concatenate([self._features(np.stack(batch)) for batch in batches])

    def total(self) -> tuple[dict[str, float], list[str]]:
        (name,) = self.measures
        try:
            distance = frechet_distance(*self._seen)
        except DheadsError as error:
            return {}, [f"{name}: {error}"]
        notes = too_few(min(gaussian.count for gaussian in self._seen), self._dim)
        return {name: distance}, [f"{name}: {notes}"] if notes else []


class WordMeter(Instrument):
    """What a lip reader makes of the videos."""

    measures = ("wer",)

    def __init__(self, reader: LipReader, words: dict[str, str] | None) -> None:
        """words: what is said, by clip; None: what the surroundings of the real clips tell."""
        self._reader, self._words = reader, words
        self._said: list[str] = []
        self._read: dict[str, list[str]] = {"wer": [], "true_wer": []}

    def look(self, pair: Pair) -> dict[str, float]:
        said = spoken_words(pair.paths[1]) if self._words is None else self._words.get(pair.clip)
        if said is None:
            raise DheadsError("nothing tells what is said in it; list it in the file of words")
        read = {f"{prefix}wer": self._reader(path) for prefix, _, path in pair.sides()}
        values = {name: word_error_rate([said], [words]) for name, words in read.items()}
        self._said.append(said)
        for name, words in read.items():
            self._read[name].append(words)
        return values

    def total(self) -> tuple[dict[str, float], list[str]]:
        if not self._said:
            return {}, []
        return {name: word_error_rate(self._said, words) for name, words in self._read.items()}, []


# ---- Which are at hand ----

_Load = Callable[[torch.device | str, bool], Instrument]
_NETWORKS: dict[str, tuple[tuple[str, ...], _Load]] = {  # weights: the measures that need them
    "syncnet": (SyncMeter.measures, lambda device, progress: SyncMeter(load_syncnet(device, progress))),
    "sface": (IdentityMeter.measures, lambda device, progress: IdentityMeter(load_recogniser(progress))),
    "fid-inception": (
        ("fid",),
        lambda device, progress: FrechetMeter("fid", load_inception(device, progress), INCEPTION_DIM),
    ),
    "fvd-i3d": (("fvd",), lambda device, progress: FrechetMeter("fvd", load_i3d(device, progress), I3D_DIM)),
}


def load_instruments(
    only: Collection[str] | None,
    device: torch.device | str = "cpu",
    lip_reader: str | None = None,
    words: Path | None = None,
    progress: bool = True,
) -> tuple[list[Instrument], dict[str, str]]:
    """The instruments of the measures `only`, or of all that are at hand; and what the others lack, by measure.

    Weights are downloaded for measures that are asked for by name, not for others.
    Raises DheadsError where a measure that is asked for by name cannot be taken.
    """
    found: list[Instrument] = []
    lacking: dict[str, str] = {}

    def add(measures: tuple[str, ...], load: Callable[[], Instrument]) -> None:
        if only is not None and not set(only) & set(measures):
            return
        try:
            found.append(load())
        except DheadsError as error:
            if only is not None:
                raise
            lacking.update(dict.fromkeys(measures, str(error)))

    for weights, (measures, load) in _NETWORKS.items():
        add(measures, partial(_with_weights, weights, partial(load, device, progress), only is not None))
    add(WordMeter.measures, partial(_word_meter, lip_reader, words))
    return found, lacking


def _with_weights(name: str, load: Callable[[], Instrument], may_fetch: bool) -> Instrument:
    if not may_fetch and cached(name) is None:
        entry = known()[name]
        raise DheadsError(
            f"{home() / entry['file']} is missing or damaged; name the measure (--metric) to download it "
            f"({entry['bytes'] / 1e6:.0f} MB), or get it at {entry['url']} and put it there"
        )
    return load()


def _word_meter(lip_reader: str | None, words: Path | None) -> WordMeter:
    if lip_reader is None:
        raise DheadsError("the word error rate needs a lip reader; give the command of one (--lip-reader)")
    return WordMeter(load_lip_reader(lip_reader), read_words(words) if words else None)
