"""Sound and video files: opened safely, and decoded as far as they are intact."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

import av
import numpy as np

from dheads.errors import DheadsError
from dheads.system.files import is_endless

MAX_SECONDS = 3 * 3600  # of sound
_RATES_HZ = (1_000, 1_000_000)
_LOUDEST = 1e6  # times full scale; louder samples are damaged
_MAX_CHANNELS = 64  # FFmpeg cannot convert more
_MAX_GAP_SECONDS = 600  # a longer jump in time is a damaged time stamp, not silence
_ROUNDING_SECONDS = 1e-3  # of time stamps
_TOLERANCE_SECONDS = 0.05  # gaps up to this within a stream are rounding, not silence

_Item = TypeVar("_Item")
_MediaStream = TypeVar("_MediaStream", av.VideoStream, av.AudioStream)
# PyAV 19 accepts tags that are not UTF-8; earlier versions do if asked to.
_ANY_TAGS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


@dataclass(frozen=True, eq=False)
class Chunk:
    """A stretch of decoded sound."""

    samples: np.ndarray  # (C, N) float, full scale from -1 to 1; louder samples exceed it
    rate: int  # Hz
    layout: av.AudioLayout  # names of the channels


# --- Opening ---------------------------------------------------------------------------------------------------------


@contextmanager
def opened(source: Path | BinaryIO, name: str, kind: str = "video or sound") -> Iterator[av.container.InputContainer]:
    """Open a container; a stream is read from its beginning and must be seekable.

    Several containers can be open on one stream. Error messages call the source `name` and the expected file `kind`.
    Raises DheadsError if the source is missing or is not a media file.
    """
    with ExitStack() as stack:
        try:
            if is_endless(source) if isinstance(source, Path) else not source.seekable():
                raise DheadsError(f"{name} is a pipe or a device; give a {kind} file")
            file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else _View(source, name)
            container = stack.enter_context(open_container(file))
        except av.FFmpegError as error:
            raise DheadsError(f"{name} is not a {kind} file: {error.strerror}") from error
        except OSError as error:
            raise DheadsError(f"cannot read {name}: {error.strerror or error}") from error
        yield container


def open_container(file: BinaryIO | io.RawIOBase, format: str | None = None) -> av.container.InputContainer:
    """A container to read, with tags in any encoding: of any format, or of that one only. Raises av.FFmpegError.

    It may use no protocols: a playlist must not make us open or download other files.
    """
    return av.open(file, "r", format=format, options={"protocol_whitelist": "none"}, **_ANY_TAGS)


class _View(io.RawIOBase):
    """A stream from its beginning, with a position of its own, so that several readers can share the stream."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.name = name
        self._stream, self._position = stream, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self._stream.seek(self._position)
        data = self._stream.read(size)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset, whence = self._position + offset, os.SEEK_SET
        self._position = self._stream.seek(offset, whence)
        return self._position


def name_of(source: Path | BinaryIO, unnamed: str = "the given data") -> str:
    """The name of a file or stream in messages; `unnamed` for a stream without a name."""
    return str(source) if isinstance(source, Path) else str(getattr(source, "name", unnamed))


def audio_stream(container: av.container.InputContainer, index: int) -> av.AudioStream:
    """The sound stream with this index among all streams of a container."""
    stream = container.streams[index]
    assert isinstance(stream, av.AudioStream)
    return stream


def start_seconds(container: av.container.InputContainer) -> float:
    """The time stamp of the container's time 0: where its first picture or sound begins, as in players."""
    # MPEG-TS begins after 0. Matroska may begin before: that counts, except for samples that only prime a decoder. MP4
    # has priming samples before 0 too, of a number that is not always known, and nothing else that is shown or heard.
    start = (container.start_time or 0) / av.time_base
    if "mp4" in container.format.name:
        return max(start, 0.0)
    priming = max((c.delay / c.rate for s in container.streams.audio if (c := s.codec_context) and c.rate), default=0)
    return 0.0 if -priming - _ROUNDING_SECONDS <= start < 0 else start


# --- Decoding --------------------------------------------------------------------------------------------------------


def packets(container: av.container.InputContainer, stream: _MediaStream) -> Iterator[av.Packet[_MediaStream]]:
    """The packets of a stream; of a truncated file, those before the cut.

    Packets come in the order of their decoding times. A packet that claims a later time than the next one loses its
    time stamps: otherwise a single damaged bit would stand for minutes of silence.
    """
    last: av.Packet[_MediaStream] | None = None
    # PyAV raises IndexError for a damaged MPEG-TS file that seems to gain streams midway.
    with suppress(av.FFmpegError, IndexError):
        for packet in container.demux(stream):
            if last is not None:
                if last.dts is not None and packet.dts is not None and last.dts > packet.dts:
                    last.dts = last.pts = None
                yield last
            last = packet
    if last is not None:
        yield last


@overload
def decoded(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]: ...


@overload
def decoded(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]: ...


def decoded(
    container: av.container.InputContainer, stream: _MediaStream
) -> Iterator[av.VideoFrame] | Iterator[av.AudioFrame]:
    """The frames of a stream; damaged packets are skipped."""
    for packet in packets(container, stream):
        # ValueError: PyAV 19, when the decoder could not be opened for an earlier packet.
        with suppress(av.FFmpegError, ValueError):
            yield from packet.decode()


def sound_in_step(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[Chunk]:
    """The sound of a stream from the container's time 0 on, in step with its time stamps.

    Gaps become silence, and samples before time 0 are left out. Raises DheadsError for a sample rate or a number of
    channels outside all usual limits, and for more than three hours of sound.
    """
    start = start_seconds(container)
    position = 0.0  # seconds yielded so far
    tolerance = 0.0  # the first frame goes exactly where its time stamp says, later ones only after a real jump
    for frame, is_last in _with_last(decoded(container, stream)):
        _check_sound(frame, container.name)
        samples = _samples(frame)
        if is_last and frame.duration and frame.time_base:  # an encoder pads its last packet; its duration says how far
            samples = samples[:, : round(frame.duration * frame.time_base * frame.rate)]
        gap = 0.0 if frame.time is None else frame.time - start - position
        if tolerance < gap < _MAX_GAP_SECONDS:
            silence = round(gap * frame.rate)
            yield from _silence(silence, len(samples), frame)
            position += silence / frame.rate
        elif position == 0 and gap < 0:
            samples = samples[:, round(-gap * frame.rate) :]
        if samples.size:
            yield Chunk(samples, frame.rate, frame.layout)
            position += samples.shape[1] / frame.rate
            tolerance = _TOLERANCE_SECONDS
        if position > MAX_SECONDS:
            raise DheadsError(f"{container.name} holds more than {MAX_SECONDS // 3600} hours of sound; cut it")


def _with_last(items: Iterable[_Item]) -> Iterator[tuple[_Item, bool]]:
    """Each item, and whether it is the last."""
    rest = iter(items)
    for current in rest:
        for following in rest:
            yield current, False
            current = following
        yield current, True


def _check_sound(frame: av.AudioFrame, name: str) -> None:
    if not _RATES_HZ[0] <= frame.rate <= _RATES_HZ[1]:
        raise DheadsError(f"{name} has {frame.rate} sound samples a second; resample it to 16000 Hz")
    if frame.layout.nb_channels > _MAX_CHANNELS:
        raise DheadsError(f"{name} has {frame.layout.nb_channels} channels of sound; mix them to two")


def _silence(count: int, channels: int, like: av.AudioFrame) -> Iterator[Chunk]:
    """`count` samples of silence, a second at a time."""
    for begin in range(0, count, like.rate):
        yield Chunk(np.zeros((channels, min(like.rate, count - begin)), np.float32), like.rate, like.layout)


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """(C, N) float, full scale from -1 to 1, of any sample format; NaN and infinity become 0."""
    if frame.format.is_planar and frame.layout.nb_channels > 7:  # PyAV would read beyond the last of eight planes
        (frame,) = av.AudioResampler(frame.format.packed).resample(frame)
    samples: np.ndarray = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype.kind in "iu":
        limits = np.iinfo(samples.dtype)
        zero = 0 if limits.min < 0 else (limits.max + 1) // 2
        samples = (samples.astype(np.float64) - zero) / (limits.max + 1 - zero)
    else:
        samples = np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0).clip(-_LOUDEST, _LOUDEST)
    return samples
