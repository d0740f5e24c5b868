"""Sound and picture stay in step to the end of a long recording, and both have its full length.

This takes the steps of `dheads sample` without a face: read the sound, make a picture of each frame's loudness, write
both. At ten minutes (SECONDS = 600) starts differ by up to 30 ms in all formats, because of 25 fps, and middles by at
most 1 ms, at the end no more than at the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from test_sync import BEEP, FRAME, Energy, marks_of, played

from dheads.media.sound import waveform_pieces
from dheads.media.writing import write_video

SECONDS = 8  # of most recordings, to save time


@dataclass(frozen=True)
class Long:
    """A recording: silence with three beeps, and with a tone over its last moments."""

    name: str
    codec: str
    hertz: int
    layout: str
    fps: Fraction | None = None  # of its pictures, where it has any
    seconds: int = SECONDS

    @property
    def marks(self) -> tuple[float, float, float]:
        """When the beeps begin, off the raster of 25 fps."""
        return 1.013, self.seconds / 2 + 0.027, self.seconds - 1.371

    def second(self, number: int) -> np.ndarray:
        """The samples (N,) float32 of one second of it."""
        time = number + np.arange(self.hertz) / self.hertz
        loud = np.any([(time >= mark) & (time < mark + BEEP) for mark in self.marks], axis=0)
        loud |= time >= self.seconds - TAIL
        return (0.7 * loud * np.sin(2 * np.pi * 1000 * time)).astype(np.float32)


TAIL = 0.2
NTSC = Fraction(30_000, 1_001)
RECORDINGS = [
    Long("8.wav", "pcm_s16le", 8_000, "mono"),
    Long("16.wav", "pcm_s16le", 16_000, "5.1"),
    Long("44.wav", "pcm_s16le", 44_100, "stereo"),
    Long("96.wav", "pcm_s16le", 96_000, "mono"),
    Long("odd.wav", "pcm_s16le", 44_101, "mono"),
    Long("telephone.wav", "pcm_mulaw", 8_000, "mono"),
    Long("slow.mp3", "libmp3lame", 8_000, "mono"),
    Long("44.mp3", "libmp3lame", 44_100, "stereo"),
    Long("8.m4a", "aac", 8_000, "mono"),
    Long("44.m4a", "aac", 44_100, "stereo"),
    Long("5.1.m4a", "aac", 24_000, "5.1"),
    Long("bare.aac", "aac", 44_100, "mono"),
    Long("opus.ogg", "libopus", 48_000, "mono"),
    Long("5.1.flac", "flac", 44_100, "5.1"),
    Long("96.flac", "flac", 96_000, "stereo"),
    Long("opus.webm", "libopus", 48_000, "stereo"),
    Long("ac3.mkv", "ac3", 32_000, "mono"),
    Long("aac.mkv", "aac", 44_100, "mono", Fraction(25)),
    Long("pcm.mov", "pcm_s16le", 48_000, "stereo", Fraction(24)),
    Long("aac.mp4", "aac", 44_100, "mono", NTSC),
    Long("mp3.flv", "libmp3lame", 44_100, "mono", NTSC),
    Long("aac.ts", "aac", 48_000, "mono", Fraction(25)),
]
# Sound that is encoded again, and sound that is copied.
FIVE_MINUTES = [replace(take, seconds=300) for take in RECORDINGS if take.name in ("8.wav", "8.m4a")]


def record(path: Path, take: Long) -> None:
    with av.open(str(path), "w") as container:
        sound = container.add_stream(take.codec, rate=take.hertz, layout=take.layout)
        pictures = gray_pictures(container, take) if take.fps else iter(())
        for second in range(take.seconds):
            samples = np.repeat(take.second(second)[None], sound.layout.nb_channels, axis=0)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=take.layout)
            frame.sample_rate, frame.pts, frame.time_base = take.hertz, second * take.hertz, Fraction(1, take.hertz)
            container.mux(next(pictures, []))
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
        for packets in pictures:
            container.mux(packets)


def gray_pictures(container: av.container.OutputContainer, take: Long) -> Iterator[list[av.Packet]]:
    """The packets of each second, then the encoder's last ones."""
    stream = container.add_stream("libx264", rate=take.fps, options={"preset": "ultrafast"})
    stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
    picture = av.VideoFrame.from_ndarray(np.full((24, 16), 90, np.uint8), format="yuv420p")
    picture.time_base = 1 / take.fps
    for second in range(take.seconds):
        packets = []
        for picture.pts in range(math.ceil(second * take.fps), math.ceil((second + 1) * take.fps)):
            packets += stream.encode(picture)
        yield packets
    yield stream.encode()


# --- The written video


def made_from(sound: Path, target: Path, piped: bool = False) -> None:
    """Write a video as `dheads sample` does; piped: as with `-o -`."""
    levels = torch.cat(list(Energy().encode_pieces(waveform_pieces(sound))))[:, 0]
    pictures = (np.full((16, 16, 3), 20 + round(200 * level), np.uint8) for level in (levels / levels.max()).tolist())
    with target.open("wb") if piped else nullcontext(target) as sink:
        write_video(sink, pictures, sound)


def stated_end(path: Path, kind: str) -> float:
    """When a stream ends, by the file's header."""
    with av.open(str(path)) as container:
        (stream,) = (stream for stream in container.streams if stream.type == kind)
        return float((stream.start_time + stream.duration) * stream.time_base)


@pytest.mark.parametrize("take", [*RECORDINGS, *FIVE_MINUTES], ids=lambda take: f"{take.name}-{take.seconds}s")
def test_flashes_and_beeps_are_together_to_the_end(take: Long, tmp_path: Path) -> None:
    record(tmp_path / take.name, take)
    made = tmp_path / "made.mp4"
    made_from(tmp_path / take.name, made)

    last_shown = together(made, take)
    # FLV, MPEG-TS and bare AAC do not mark the samples that pad the first and the last packet.
    assert -0.01 <= stated_end(made, "audio") - take.seconds <= 0.06
    assert abs(stated_end(made, "video") - stated_end(made, "audio")) <= FRAME
    assert last_shown + FRAME == pytest.approx(stated_end(made, "video"))


@pytest.mark.parametrize("name", ["8.wav", "44.mp3", "44.m4a", "opus.ogg", "bare.aac", "aac.ts"])
def test_they_are_in_a_stream_too(name: str, tmp_path: Path) -> None:
    """The last two have AAC with a header in every packet, which must be stripped for a stream."""
    (take,) = (take for take in RECORDINGS if take.name == name)
    record(tmp_path / name, take)
    made = tmp_path / "made.mp4"
    made_from(tmp_path / name, made, piped=True)

    assert abs(together(made, take) + FRAME - take.seconds) <= 0.06


def together(made: Path, take: Long) -> float:
    """Check that picture and sound are in step; returns the time of the last picture."""
    shown, brightness, heard, samples = played(made, *((mark - 0.5, mark + 0.5) for mark in take.marks))
    flashes, middles = marks_of(shown, np.maximum(brightness - brightness.min() - 4, 0), FRAME)
    beeps, beep_middles = marks_of(heard, samples**2)
    assert np.abs(flashes - beeps).max() <= FRAME
    offsets = middles - beep_middles
    assert np.abs(offsets).max() <= 0.1 * FRAME
    assert np.ptp(offsets) <= 0.1 * FRAME, "no drift"

    shown, _, heard, samples = played(made, (take.seconds - 1, math.inf))
    # AC-3's encoder does not state its delay of 256 samples.
    assert heard[np.abs(samples) > 0.1][-1] >= take.seconds - 0.01, "all of the tone"
    return shown[-1]
