"""Sound and video files, opened safely and read past their damage."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from dheads.errors import DheadsError
from dheads.files import is_endless


@contextmanager
def opened(source: Path | BinaryIO, name: str, kind: str = "video or sound") -> Iterator[av.container.InputContainer]:
    """An open container, a stream from its beginning. Raises DheadsError for what is missing or no media.

    Several may be open on one stream that can be sought in. name, kind: what the message calls the source and what it
    misses.
    """
    with ExitStack() as stack:
        try:
            if isinstance(source, Path) and is_endless(source):
                raise DheadsError(f"{name} is a pipe or a device; give a {kind} file")
            file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
            if file is source and file.seekable():
                file = _View(file, name)
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


def mono(frame: av.AudioFrame) -> np.ndarray:
    """(N,) float32 in [-1, 1]: the mean of the channels, whatever the sample format."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T  # (channels, N)
    if samples.dtype.kind in "iu":
        limits = np.iinfo(samples.dtype)
        zero = 0 if limits.min < 0 else (limits.max + 1) // 2
        samples = (samples.astype(np.float64) - zero) / (limits.max + 1 - zero)
    with np.errstate(all="ignore"):  # damaged 64-bit samples may be too large for 32 bits
        mono = samples.mean(axis=0, dtype=np.float64).astype(np.float32)
    return np.nan_to_num(mono, copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def start_seconds(container: av.container.InputContainer) -> float:
    """The time stamp of the container's time 0."""
    # MPEG-TS and encoder delay begin after 0; priming packets before 0 are not shown or heard.
    return max(container.start_time or 0, 0) / av.time_base
