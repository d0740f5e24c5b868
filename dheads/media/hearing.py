"""What the speech encoder hears of a file: which sound stream, which channels mixed to mono, and at what gain.

Sound of usual loudness, in one channel or in several that do not cancel each other, is the exact mean of its channels.
The choice is made once for the whole file, so nothing jumps within it. It takes a few seconds of most files, but all of
a file in which nothing is loud.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.stream import Disposition
from torch import Tensor

from dheads.errors import DheadsError
from dheads.media.containers import Chunk, audio_stream, name_of, opened, sound_in_step

# Loudness, in dB of full scale, is the level reached for a tenth of a second in all, the length of a vowel: clicks are
# shorter. 455 speech clips have -30 to -6 dB, most -9 dB. The packaged weights follow quieter speech less well: their
# lip codes correlate with those of the same speech at usual loudness by 0.97 at -35 dB, 0.83 at -50 and 0.00 at -65.
_LOUD_SECONDS, _BLOCK_SECONDS = 0.1, 0.02
_QUIET, _USUAL, _SILENT = -36, -15, -80  # dB
_RANGE = 120  # dB
_MIN_SECONDS = 60  # the sound that must be heard before several channels are compared: they differ over time
_CANCELLED = 4  # channels cancel if inverting some gives this many times the power; ordinary stereo stays below 1
_CENTRE_SHARE = 0.01  # of the loudest channel's power; a weaker centre channel holds no voice
_MAX_STREAMS = 8  # of a file that are tried for sound


@dataclass(frozen=True, eq=False)
class Hearing:
    """How the sound of one file is turned into mono."""

    stream: int  # index of the stream in its container
    signs: np.ndarray  # (C,): weight of each channel: 1 as it is, -1 inverted, 0 left out
    gain: float
    notes: list[str]  # sentences for the user about unusual sound

    def mono(self, samples: np.ndarray) -> np.ndarray:
        """(C, N) -> (N,) float32. All channels are mixed if their number is not that of `signs`."""
        if len(samples) == len(self.signs):
            heard = self.signs != 0
            samples = samples[heard] * self.signs[heard, None]
        mixed: np.ndarray = samples.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mixed

    def amplified(self, piece: Tensor) -> Tensor:
        """(N,) at its gain, without the direct current (the median), which would be amplified too."""
        return piece if self.gain == 1 else (piece - piece.median()) * self.gain


def hear(source: Path | BinaryIO) -> Hearing:
    """Choose the stream, channels and gain of a file; a stream that is silent gives way to one that is not.

    Raises DheadsError for a missing or unreadable file, and for one without sound.
    """
    name = name_of(source, "the given sound")
    streams = _streams(source, name)
    ears: list[_Ear] = []
    for index in streams[:_MAX_STREAMS]:
        with opened(source, name, "sound or video") as container:
            ears.append(_Ear(sound_in_step(container, audio_stream(container, index))))
        if not ears[-1].is_silent:
            break
    chosen = 0 if ears[-1].is_silent else len(ears) - 1
    ear = ears[chosen]
    notes = _stream_notes(streams, chosen) + ear.notes
    return Hearing(streams[chosen], ear.signs, 10 ** (ear.gain_db / 20), [f"{name}: {note}" for note in notes])


def played_stream(source: Path | BinaryIO) -> int:
    """The index in its container of the sound stream to play: the one that `hear` chooses. Raises as `hear` does."""
    streams = _streams(source, name_of(source, "the given sound"))
    return streams[0] if len(streams) == 1 else hear(source).stream


def _streams(source: Path | BinaryIO, name: str) -> list[int]:
    """The indices of the sound streams that can be decoded, in the order in which players prefer them."""
    with opened(source, name, "sound or video") as container:
        streams = [stream for stream in container.streams.audio if stream.codec_context]
        if not streams:
            raise DheadsError(f"{name} holds no sound stream that can be read; give a file with speech in it")
        return [stream.index for stream in sorted(streams, key=_rank)]


def _rank(stream: av.AudioStream) -> tuple[bool, bool]:
    comments = Disposition.comment | Disposition.hearing_impaired | Disposition.visual_impaired
    return bool(stream.disposition & comments), not stream.disposition & Disposition.default


def _stream_notes(streams: list[int], chosen: int) -> list[str]:
    if chosen > 0:
        why = "because the one that players choose is silent"
    elif streams[0] != min(streams):
        why = "the one that players choose"
    else:
        return []
    return [f"taking sound stream {sorted(streams).index(streams[chosen]) + 1} of {len(streams)}, {why}"]


class _Ear:
    """Loudness and channels of a stream, measured on as much of it as is needed."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._seconds = np.zeros(_RANGE + 1)  # seconds of sound at each level, in dB below full scale
        self._begin(av.AudioLayout("mono"))
        for chunk in chunks:
            if len(chunk.samples) != len(self._covariance):
                self._begin(chunk.layout)
            self._listen(chunk)
            if self._is_certain:
                break

    def _begin(self, layout: av.AudioLayout) -> None:
        channels = layout.nb_channels
        self._layout = layout
        self._covariance = np.zeros((channels, channels))  # integrated over seconds

    def _listen(self, chunk: Chunk) -> None:
        samples = chunk.samples.clip(-1, 1).astype(np.float64)
        samples -= samples.mean(axis=1, keepdims=True)  # direct current is no sound
        self._covariance += samples @ samples.T / chunk.rate
        signs = self.signs
        mono = signs @ samples / np.abs(signs).sum()
        for block in np.array_split(mono, max(1, round(len(mono) / (_BLOCK_SECONDS * chunk.rate)))):
            below_db = -10 * np.log10(block.var() + 1e-30)
            self._seconds[round(min(max(below_db, 0), _RANGE))] += len(block) / chunk.rate

    @property
    def _is_certain(self) -> bool:
        known = len(self._covariance) == 1 or self._seconds.sum() >= _MIN_SECONDS
        return bool(known and self._seconds[: -_QUIET + 1].sum() >= _LOUD_SECONDS)

    @property
    def is_silent(self) -> bool:
        return self._loudness < _SILENT

    @property
    def _loudness(self) -> int:
        reached = np.cumsum(self._seconds)
        return -int(np.argmax(reached >= min(_LOUD_SECONDS, reached[-1] / 10))) if reached[-1] else -_RANGE

    @property
    def gain_db(self) -> int:
        return _USUAL - self._loudness if _SILENT <= self._loudness < _QUIET else 0

    @property
    def _centre(self) -> int | None:
        """The centre channel of surround sound, which holds the voice, unless it is all but silent."""
        if len(self._covariance) < 3:
            return None
        names = [channel.name for channel in self._layout.channels]
        centre, power = names.index("FC") if "FC" in names else None, np.diag(self._covariance)
        return centre if centre is not None and power[centre] > _CENTRE_SHARE * power.max() else None

    @property
    def signs(self) -> np.ndarray:
        """The weight of each channel (C,), as in `Hearing`."""
        even = np.ones(len(self._covariance))
        if (centre := self._centre) is not None:
            only: np.ndarray = np.eye(len(even))[centre]
            return only
        least = _CANCELLED * _power(self._covariance, even)
        if least >= np.trace(self._covariance) / len(even):  # no choice of signs gives more power
            return even
        main = np.linalg.eigh(self._covariance)[1][:, -1]  # the principal component of the channels
        inverted = np.where(main * main[np.abs(main).argmax()] < 0, -1.0, 1.0)
        return inverted if _power(self._covariance, inverted) > least else even

    @property
    def notes(self) -> list[str]:
        found = []
        if self._centre is not None:
            found.append(f"of its {self._layout.name} channels the lips follow the centre")
        elif (self.signs < 0).any():
            found.append("its channels cancel each other; the lips follow it with one inverted")
        if self.is_silent:
            found.append("it is silent, so the mouth rests")
        elif self.gain_db:
            found.append(f"it is very quiet; the lips follow it made {self.gain_db} dB louder")
        return found


def _power(covariance: np.ndarray, signs: np.ndarray) -> float:
    """The power of the mean of the channels with these signs."""
    return float(signs @ covariance @ signs / np.abs(signs).sum() ** 2)
