"""Sound and video files, opened safely and read past their damage."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from dheads.errors import DheadsError
from dheads.system.files import is_endless

MAX_SECONDS = 3 * 3600  # of sound
_RATES_HZ = (1_000, 1_000_000)
_LOUDEST = 1e6  # times full scale; what is louder is damage
_MAX_CHANNELS = 64  # more cannot be converted
_MAX_GAP_SECONDS = 600  # a jump in time beyond this is a damaged time stamp, not silence
_ROUNDING_SECONDS = 1e-3  # of time stamps


@dataclass(frozen=True, eq=False)
class Chunk:
    """A moment of sound."""

    samples: np.ndarray  # (C, N) float, full scale from -1 to 1, though sound may be louder
    rate: int  # Hz
    layout: av.AudioLayout  # what the channels are


@contextmanager
def opened(source: Path | BinaryIO, name: str, kind: str = "video or sound") -> Iterator[av.container.InputContainer]:
    """An open container, a stream from its beginning. Raises DheadsError for what is missing or no media.

    Several may be open on one stream, which must be one that can be sought in. name, kind: what the message calls the
    source and what it misses.
    """
    with ExitStack() as stack:
        try:
            if is_endless(source) if isinstance(source, Path) else not source.seekable():
                raise DheadsError(f"{name} is a pipe or a device; give a {kind} file")
            file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else _View(source, name)
            # Nested addresses (playlists) are refused: a media file must not make us fetch another.
            options = {"protocol_whitelist": "none"}
            container = stack.enter_context(av.open(file, options=options, metadata_errors="replace"))
        except av.FFmpegError as error:
            raise DheadsError(f"{name} is not a {kind} file: {error.strerror}") from error
        except OSError as error:
            raise DheadsError(f"cannot read {name}: {error.strerror or error}") from error
        yield container


class _View(io.RawIOBase):
    """A stream from its beginning, with a place in it of its own: others read the same stream in between."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.name = name
        self._stream, self._place = stream, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self._stream.seek(self._place)
        data = self._stream.read(size)
        self._place += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset, whence = self._place + offset, os.SEEK_SET
        self._place = self._stream.seek(offset, whence)
        return self._place


def name_of(source: Path | BinaryIO, unnamed: str = "the given data") -> str:
    """What messages call a file or a stream."""
    return str(source) if isinstance(source, Path) else str(getattr(source, "name", unnamed))


def packets(container: av.container.InputContainer, stream: av.stream.Stream) -> Iterator[av.Packet]:
    """A stream's packets; a file that is cut short gives those before the cut.

    Packets come in the order of their decoding times: one that claims a later time than the next loses its times, or a
    single damaged bit would stand for minutes of silence.
    """
    last: av.Packet | None = None
    # PyAV's IndexError: a damaged MPEG-TS seems to gain streams midway, which it does not expect.
    with suppress(av.FFmpegError, IndexError):
        for packet in container.demux(stream):
            if last is not None:
                if None not in (last.dts, packet.dts) and last.dts > packet.dts:
                    last.dts = last.pts = None
                yield last
            last = packet
    if last is not None:
        yield last


def decoded(container: av.container.InputContainer, stream: av.stream.Stream) -> Iterator[av.frame.Frame]:
    """A stream's frames; damaged packets are skipped."""
    for packet in packets(container, stream):
        with suppress(av.FFmpegError):
            yield from packet.decode()


def sound_in_step(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[Chunk]:
    """A stream's sound from the container's time 0 on; silence is put in and samples left out as time stamps demand.

    Raises DheadsError for a sample rate or a number of channels that nothing has, and for more than three hours.
    """
    start = start_seconds(container)
    position = 0.0  # seconds given out so far
    tolerance = 0.0  # the first frame is placed exactly, later ones only where time stamps really jump
    for frame, following in pairwise(chain(decoded(container, stream), [None])):
        if not _RATES_HZ[0] <= frame.rate <= _RATES_HZ[1]:
            raise DheadsError(f"{container.name} has {frame.rate} sound samples a second; resample it to 16000 Hz")
        if frame.layout.nb_channels > _MAX_CHANNELS:
            raise DheadsError(f"{container.name} has {frame.layout.nb_channels} channels of sound; mix them to two")
        samples = _samples(frame)
        if following is None and frame.duration:  # an encoder fills its last packet up; the packet says how far
            samples = samples[:, : round(frame.duration * frame.time_base * frame.rate)]
        gap = 0.0 if frame.time is None else frame.time - start - position
        if tolerance < gap < _MAX_GAP_SECONDS:
            silence = round(gap * frame.rate)
            for begin in range(0, silence, frame.rate):
                blank = np.zeros((len(samples), min(frame.rate, silence - begin)), np.float32)
                yield Chunk(blank, frame.rate, frame.layout)
            position += silence / frame.rate
        elif position == 0 and gap < 0:
            samples = samples[:, round(-gap * frame.rate) :]
        if samples.size:
            yield Chunk(samples, frame.rate, frame.layout)
            position += samples.shape[1] / frame.rate
            tolerance = 0.05
        if position > MAX_SECONDS:
            raise DheadsError(f"{container.name} holds more than {MAX_SECONDS // 3600} hours of sound; cut it")


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """(C, N) float, full scale from -1 to 1, whatever the sample format; NaN and infinity become 0."""
    if frame.format.is_planar and frame.layout.nb_channels > 7:  # PyAV would read beyond the last of eight planes
        (frame,) = av.AudioResampler(frame.format.packed).resample(frame)
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype.kind in "iu":
        limits = np.iinfo(samples.dtype)
        zero = 0 if limits.min < 0 else (limits.max + 1) // 2
        return (samples.astype(np.float64) - zero) / (limits.max + 1 - zero)
    return np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0).clip(-_LOUDEST, _LOUDEST)


def start_seconds(container: av.container.InputContainer) -> float:
    """The time stamp of the container's time 0: where its first picture or sound begins, as in players."""
    # MPEG-TS begins after 0. Matroska may begin before: that counts, but for samples that only prime a decoder. MP4 has
    # such samples before 0 too, whose number is not always known, and nothing else that is shown or heard.
    start = (container.start_time or 0) / av.time_base
    if "mp4" in container.format.name:
        return max(start, 0.0)
    priming = max((c.delay / c.rate for s in container.streams.audio if (c := s.codec_context) and c.rate), default=0)
    return 0.0 if -priming - _ROUNDING_SECONDS <= start < 0 else start
