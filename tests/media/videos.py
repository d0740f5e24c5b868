"""Small videos and sounds made for tests, and their contents."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def gray(index: int, size: int = 64) -> np.ndarray:
    """A gray frame with its number as its brightness."""
    return np.full((size, size, 3), 16 + 4 * index, np.uint8)


def number(frame: np.ndarray) -> int:
    return round((float(frame.mean()) - 16) / 4)


def write_pictures(path: Path, times: list[Fraction], ticks: int = 90_000, size: int = 64) -> None:
    """A video whose frame number i appears at times[i] seconds and stays until the next; the last for 1/25 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width = stream.height = size
        stream.codec_context.time_base = Fraction(1, ticks)
        ends = [*times[1:], times[-1] + Fraction(1, 25)]
        for index, (begin, end) in enumerate(zip(times, ends, strict=True)):
            frame = av.VideoFrame.from_ndarray(gray(index, size))
            frame.pts, frame.time_base = round(begin * ticks), Fraction(1, ticks)
            frame.duration = round(end * ticks) - frame.pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_sound(path: Path, codec: str, rate: int, layout: str = "mono", seconds: float = 2.0) -> None:
    """Bursts of a rising tone, so that no two moments are alike."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options={"strict": "-2"})
        t = np.arange(round(seconds * rate)) / rate
        wave = 0.3 * np.sin(2 * np.pi * (200 + 300 * t) * t) * (np.sin(2 * np.pi * 2.7 * t) > 0)
        for begin in range(0, len(t), 1000):
            part = np.repeat(wave[None, begin : begin + 1000], stream.layout.nb_channels, 0).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def boxes(data: bytes) -> list[str]:
    """The names of an MP4 file's outermost boxes, in order."""
    names, at = [], 0
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        names.append(name.decode())
        at += size
    return names
