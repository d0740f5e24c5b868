"""Measures that need a network or a lip reader, behind one interface.

An instrument measures one pair of videos after another. Measures of the whole set, such as the FID, follow at the end.
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
from dheads.evaluation.features import CLIP_FRAMES, I3D_DIM, INCEPTION_DIM, load_i3d, load_inception
from dheads.evaluation.frechet import Gaussian, frechet_distance, too_few
from dheads.evaluation.lipreading import LipReader, load_lip_reader
from dheads.evaluation.measures import slope
from dheads.evaluation.pairs import FootagePair
from dheads.evaluation.recognition import Recogniser, load_recogniser, similarity
from dheads.evaluation.syncnet import SyncNet, load_syncnet, sync
from dheads.evaluation.syncnet_crops import face_crops
from dheads.evaluation.transcripts import read_words, spoken_words, word_error_rate
from dheads.faces.alignment import mouth_opening
from dheads.media.sound import SAMPLES_PER_FRAME, load_waveform
from dheads.speech.encoders import load_speech_encoder
from dheads.speech.sync import ENCODER, LipSync, is_long_enough
from dheads.weights.fetching import cached
from dheads.weights.listing import home, known

_BATCH = CLIP_FRAMES  # frames: one clip of the FVD


class Instrument(ABC):
    """Takes one or more related measures."""

    measures: tuple[str, ...]

    @abstractmethod
    def measure(self, pair: FootagePair) -> dict[str, float]:
        """The measures of one pair, by name. Raises DheadsError if it cannot be measured."""

    def total(self) -> tuple[dict[str, float], list[str]]:
        """The measures of all pairs together, and warnings about them."""
        return {}, []


# ---- The instruments ----


class SyncMeter(Instrument):
    """How well lips and sound agree."""

    measures = ("av_offset", "av_confidence", "av_distance")

    def __init__(self, net: SyncNet) -> None:
        self._net = net

    def measure(self, pair: FootagePair) -> dict[str, float]:
        values: dict[str, float] = {}
        for prefix, video, path in pair.sides():
            waveform = load_waveform(path).numpy() * 32768  # to int16 units
            result = sync(self._net, face_crops(video.read(), video.landmarks), waveform)
            figures = (result.offset, result.confidence, result.distance)
            values |= {f"{prefix}{name}": figure for name, figure in zip(self.measures, figures, strict=True)}
        return values


class LipMeter(Instrument):
    """The same without a downloaded network: the mouth's opening that is seen against the one that is heard."""

    measures = ("sync_offset_ms", "sync_correlation")

    def __init__(self, device: torch.device | str) -> None:
        self._lip_sync, self._encoder = LipSync(), load_speech_encoder(ENCODER, device)

    def measure(self, pair: FootagePair) -> dict[str, float]:
        values: dict[str, float] = {}
        sound, speech = torch.empty(0), torch.empty(0)
        for prefix, video, path in pair.sides():
            opening = mouth_opening(video.landmarks)
            if not is_long_enough(opening):
                continue
            waveform = load_waveform(path)[: len(opening) * SAMPLES_PER_FRAME]
            if not torch.equal(waveform, sound):  # most generated videos have the sound of the real one
                sound, speech = waveform, self._encoder.encode(waveform, len(opening))
            if found := self._lip_sync(speech, opening):
                figures = (1000 * found.offset_seconds, found.correlation)
                values |= {f"{prefix}{name}": figure for name, figure in zip(self.measures, figures, strict=True)}
        return values


class IdentityMeter(Instrument):
    """How similar the face stays to the first frame of the real clip."""

    measures = ("identity_similarity",)

    def __init__(self, recogniser: Recogniser) -> None:
        self._recogniser = recogniser

    def measure(self, pair: FootagePair) -> dict[str, float]:
        first = int(pair.reference.seen.argmax())
        identity = next(islice(pair.reference.read(), first, None)), pair.reference.landmarks[first]
        return {
            f"{prefix}identity_similarity": float(
                np.nanmean(similarity(self._recogniser, video.read(), video.landmarks, *identity))
            )
            for prefix, video, _ in pair.sides()
        }


class FrechetMeter(Instrument):
    """The Frechet distance of all generated frames, or short clips, from the real ones."""

    def __init__(self, name: str, features: Callable[[np.ndarray], np.ndarray], dim: int) -> None:
        """features: (F, H, W, 3) uint8 frames -> (N, dim)."""
        self.measures = (name,)
        self._features, self._dim = features, dim
        self._gaussians = Gaussian(), Gaussian()  # generated, real

    def measure(self, pair: FootagePair) -> dict[str, float]:
        # Both sides first, so that a pair of which one side fails adds nothing.
        features = [self._features_of(video.read()) for _, video, _ in pair.sides()]
        for gaussian, rows in zip(self._gaussians, features, strict=True):
            gaussian.add(rows)
        return {}

    def _features_of(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        remaining = iter(frames)
        batches = iter(lambda: list(islice(remaining, _BATCH)), [])
        return np.concatenate([self._features(np.stack(batch)) for batch in batches])

    def total(self) -> tuple[dict[str, float], list[str]]:
        (name,) = self.measures
        try:
            distance = frechet_distance(*self._gaussians)
        except DheadsError as error:
            return {}, [f"{name}: {error}"]
        warning = too_few(min(gaussian.count for gaussian in self._gaussians), self._dim)
        return {name: distance}, [f"{name}: {warning}"] if warning else []


class WordMeter(Instrument):
    """The word error rate of a lip reader."""

    measures = ("wer",)

    def __init__(self, reader: LipReader, transcripts: dict[str, str] | None) -> None:
        """transcripts: the spoken words by clip; None: those of `spoken_words`."""
        self._reader, self._transcripts = reader, transcripts
        self._spoken: list[str] = []
        self._read: dict[str, list[str]] = {"wer": [], "true_wer": []}

    def measure(self, pair: FootagePair) -> dict[str, float]:
        files = pair.files
        spoken = spoken_words(files.reference) if self._transcripts is None else self._transcripts.get(files.clip)
        if spoken is None:
            raise DheadsError("its spoken words are not known; list them in the file of words")
        read = {f"{prefix}wer": self._reader(path) for prefix, _, path in pair.sides()}
        values = {name: word_error_rate([spoken], [words]) for name, words in read.items()}
        self._spoken.append(spoken)
        for name, words in read.items():
            self._read[name].append(words)
        return values

    def total(self) -> tuple[dict[str, float], list[str]]:
        if not self._spoken:
            return {}, []
        return {name: word_error_rate(self._spoken, words) for name, words in self._read.items()}, []


class OpeningMeter(Instrument):
    """How far the mouth opens of what is heard."""

    measures = ("mouth_slope",)

    def __init__(self, heard: Callable[[str], np.ndarray]) -> None:
        """heard: returns the opening (F,), in eye distances, that the sound of a clip foretells."""
        self._heard = heard

    def measure(self, pair: FootagePair) -> dict[str, float]:
        heard = self._heard(pair.files.clip)
        slopes = {
            f"{prefix}mouth_slope": slope(mouth_opening(video.landmarks), heard) for prefix, video, _ in pair.sides()
        }
        return {name: value for name, value in slopes.items() if np.isfinite(value)}


# ---- Loading those that are available ----

_Load = Callable[[torch.device | str, bool], Instrument]
_NETWORKS: dict[str, tuple[tuple[str, ...], _Load]] = {  # weights: (measures that need them, loader)
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
    """Load the instruments of the measures `only`, or all that are available without a download.

    Returns them, and for each measure that is not available the reason. Weights of the measures in `only` are
    downloaded. lip_reader: see `load_lip_reader`. words: see `read_words`.
    Raises DheadsError if a measure in `only` is not available.
    """
    instruments: list[Instrument] = []
    unavailable: dict[str, str] = {}

    def add(measures: tuple[str, ...], load: Callable[[], Instrument]) -> None:
        if only is not None and not set(only) & set(measures):
            return
        try:
            instruments.append(load())
        except DheadsError as error:
            if only is not None:
                raise
            unavailable.update(dict.fromkeys(measures, str(error)))

    add(LipMeter.measures, partial(LipMeter, device))
    for weights, (measures, load) in _NETWORKS.items():
        add(measures, partial(_with_weights, weights, partial(load, device, progress), only is not None))
    add(WordMeter.measures, partial(_word_meter, lip_reader, words))
    return instruments, unavailable


def _with_weights(name: str, load: Callable[[], Instrument], may_download: bool) -> Instrument:
    if not may_download and cached(name) is None:
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
