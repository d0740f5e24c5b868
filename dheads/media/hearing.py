"""How sound is heard, as opposed to how it is played: which of a file's streams, its channels as one, how much louder.

Sound of usual loudness in one channel, or in several that do not cancel each other, is heard as the mean of its
channels, to the bit. What is decided once holds for the whole file, so nothing jumps within it. It is decided from as
much of the sound as it takes: a few seconds of most files, but all of a file in which nothing is loud.
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
from dheads.media.containers import Chunk, name_of, opened, sound_in_step

# Loudness, in dB of full scale, is what is reached for a tenth of a second in all, a word's vowel: clicks are shorter.
# Of 455 clips of speech it is -30 to -6, mostly -9. The packaged weights' lips follow quieter speech worse: their codes
# correlate with those of the same speech at its usual loudness by 0.97 at -35, 0.83 at -50 and 0.00 at -65.
_LOUD_SECONDS, _BLOCK_SECONDS = 0.1, 0.02
_QUIET, _USUAL, _SILENT = -36, -15, -80
_RANGE = 120  # dB
# Channels may differ from moment to moment: so much is looked at before they are judged.
_LOOKED_AT_SECONDS = 60
_CANCELLED = 4  # times the power if inverted channels were turned; of ordinary stereo it is less than 1
_CENTRE_SHARE = 0.01  # of the loudest channel's power; less is no voice in the centre
_TRIED = 8  # sound streams of a file


@dataclass(frozen=True, eq=False)
class Hearing:
    """What is heard of one file."""

    stream: int  # of its container
    signs: np.ndarray  # (C,): 1 for a channel that is heard, -1 for one that is turned first, 0 for another
    gain: float
    notes: list[str]  # what is unusual

    def mono(self, samples: np.ndarray) -> np.ndarray:
        """(C, N) -> (N,) float32. Channels that are of another number than was known are all heard."""
        if len(samples) == len(self.signs):
            heard = self.signs != 0
            samples = samples[heard] * self.signs[heard, None]
        return samples.mean(axis=0, dtype=np.float64).astype(np.float32)

    def amplified(self, piece: Tensor) -> Tensor:
        """(N,), which is best a minute or so, without the direct current that would be amplified too."""
        return piece if self.gain == 1 else (piece - piece.median()) * self.gain


def hear(source: Path | BinaryIO) -> Hearing:
    """How to hear a file. Raises DheadsError for a missing or unreadable file, and for one without sound."""
    name = name_of(source, "the given sound")
    streams = _streams(source, name)
    ears: list[_Ear] = []
    for stream in streams[:_TRIED]:
        with opened(source, name, "sound or video") as container:
            ears.append(_Ear(sound_in_step(container, container.streams[stream])))
        if not ears[-1].is_silent:
            break
    taken = 0 if ears[-1].is_silent else len(ears) - 1
    ear, stream = ears[taken], streams[taken]
    notes = _stream_notes(streams, taken) + ear.notes
    return Hearing(stream, ear.signs, 10 ** (ear.gain_db / 20), [f"{name}: {note}" for note in notes])


def played_stream(source: Path | BinaryIO) -> int:
    """The number in its container of the sound stream to play, which is the one that is heard. Raises as `hear`."""
    streams = _streams(source, name_of(source, "the given sound"))
    return streams[0] if len(streams) == 1 else hear(source).stream


def _streams(source: Path | BinaryIO, name: str) -> list[int]:
    """The sound streams that can be decoded, those first that players take first."""
    with opened(source, name, "sound or video") as container:
        streams = [stream for stream in container.streams.audio if stream.codec_context]
        if not streams:
            raise DheadsError(f"{name} holds no sound stream that can be read; give a file with speech in it")
        return [stream.index for stream in sorted(streams, key=_rank)]


def _rank(stream: av.AudioStream) -> tuple[bool, bool]:
    comments = Disposition.comment | Disposition.hearing_impaired | Disposition.visual_impaired
    return bool(stream.disposition & comments), not stream.disposition & Disposition.default


def _stream_notes(streams: list[int], taken: int) -> list[str]:
    if taken > 0:
        why = "as what players take is silent"
    elif streams[0] != min(streams):
        why = "the one that players take"
    else:
        return []
    return [f"taking sound stream {sorted(streams).index(streams[taken]) + 1} of {len(streams)}, {why}"]


class _Ear:
    """What is known of a stream once enough of it was heard."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._seconds = np.zeros(_RANGE + 1)  # by the loudness of what is heard, in dB below full scale
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
        self._covariance = np.zeros((channels, channels))  # summed up over seconds

    def _listen(self, chunk: Chunk) -> None:
        samples = chunk.samples.clip(-1, 1).astype(np.float64)
        samples -= samples.mean(axis=1, keepdims=True)  # direct current is no sound
        self._covariance += samples @ samples.T / chunk.rate
        signs = self.signs
        mono = signs @ samples / np.abs(signs).sum()
        for block in np.array_split(mono, max(1, round(len(mono) / (_BLOCK_SECONDS * chunk.rate)))):
            below = -10 * np.log10(block.var() + 1e-30)
            self._seconds[round(min(max(below, 0), _RANGE))] += len(block) / chunk.rate

    @property
    def _is_certain(self) -> bool:
        known = len(self._covariance) == 1 or self._seconds.sum() >= _LOOKED_AT_SECONDS
        return known and self._seconds[: -_QUIET + 1].sum() >= _LOUD_SECONDS

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
        """The channel of film sound that has the voice, if there is any sound in it."""
        if len(self._covariance) < 3:
            return None
        names = [channel.name for channel in self._layout.channels]
        centre, power = names.index("FC") if "FC" in names else None, np.diag(self._covariance)
        return centre if centre is not None and power[centre] > _CENTRE_SHARE * power.max() else None

    @property
    def signs(self) -> np.ndarray:
        """As `Hearing` has them."""
        even = np.ones(len(self._covariance))
        if (centre := self._centre) is not None:
            return np.eye(len(even))[centre]
        heard = _CANCELLED * _power(self._covariance, even)
        if heard >= np.trace(self._covariance) / len(even):  # no signs give more than that
            return even
        main = np.linalg.eigh(self._covariance)[1][:, -1]  # what the channels share
        turned = np.where(main * main[np.abs(main).argmax()] < 0, -1.0, 1.0)
        return turned if _power(self._covariance, turned) > heard else even

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
    """Of the mean of the channels with these signs."""
    return signs @ covariance @ signs / np.abs(signs).sum() ** 2
