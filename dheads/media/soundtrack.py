"""The sound of a video that is written: copied bit for bit, or encoded to AAC, which plays everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
from av.bitstream import BitStreamFilterContext

from dheads.config import SAMPLE_RATE, AudioCodec
from dheads.media.containers import Chunk, name_of, opened, packets, sound_in_step, start_seconds
from dheads.media.hearing import played_stream

# What MP4 can hold and browsers play, but other players do not: MP3, FLAC and Opus are silent in QuickTime, on iPhones
# or in Windows' player, ALAC outside Apple's world.
_COPIED = {"aac": "AAC", "mp3": "MP3", "alac": "ALAC", "flac": "FLAC", "opus": "Opus"}
# By container: what people call it, and which of these it holds.
_HELD = {"mp4": ("MP4", set(_COPIED)), "mov": ("MOV", {"aac", "mp3", "alac"}), "ipod": ("M4V", {"aac", "alac"})}
_MIN_MP3_RATE = 16_000  # slower MP3 ("MPEG 2.5") is not in MP4's standard
# Windows' decoder takes AAC of up to 48 kHz and 5.1 channels.
_AAC_RATES = (48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}  # by number of channels
_BITS_A_SAMPLE = 6  # at most, in each channel of AAC


@dataclass(frozen=True)
class Soundtrack:
    """Sound for one video."""

    add: Callable[[av.container.OutputContainer], Iterator[av.Packet]]  # its stream; returns the packets to mux
    notes: list[str] = field(default_factory=list)  # what the user should know


def no_sound() -> Soundtrack:
    return Soundtrack(lambda output: iter(()))


# --- The sound of a file ---------------------------------------------------------------------------------------------


@contextmanager
def source_sound(audio: Path | BinaryIO, codec: AudioCodec, container: str = "mp4") -> Iterator[Soundtrack]:
    """The sound of a file: LC-AAC is copied, and for "copy" all that the container (FFmpeg's name) can hold; other
    sound becomes AAC.

    Raises DheadsError for unreadable sound.
    """
    name, number = name_of(audio, "the given sound"), played_stream(audio)
    with opened(audio, name, "sound or video") as source:
        stream = source.streams[number]
        kind = _kind(stream.codec_context)
        can_copy = _fits(stream.codec_context, container)
        if can_copy and (codec == "copy" or kind == "LC-AAC"):
            yield Soundtrack(partial(_add_copy, source, stream))
        elif can_copy:
            note = f"{name}: its {kind} sound is encoded to AAC, which plays everywhere; --audio copy keeps it as it is"
            yield Soundtrack(partial(_add_encoded, source, stream), [note])
        else:
            note = f"{name}: {_HELD[container][0]} cannot hold its {kind} sound, which is encoded to AAC"
            yield Soundtrack(partial(_add_encoded, source, stream), [note] if codec == "copy" else [])


def _kind(codec: av.AudioCodecContext) -> str:
    """What messages call a codec; AAC, which has several kinds, by its kind."""
    name = codec.codec.canonical_name
    if name == "aac" and codec.profile:  # such as LC, HE-AAC
        return codec.profile if "AAC" in codec.profile else f"{codec.profile}-AAC"
    return _COPIED.get(name, name)


def _fits(codec: av.AudioCodecContext, container: str) -> bool:
    name = codec.codec.canonical_name
    if name not in _HELD[container][1]:
        return False
    if name == "mp3":
        return codec.sample_rate >= _MIN_MP3_RATE
    # MP4 wants the codec's header, which damaged files lack; that of AAC is made where every packet says of what kind.
    return bool(codec.extradata or (name == "aac" and codec.profile))


def _add_copy(
    source: av.container.InputContainer, stream: av.AudioStream, output: av.container.OutputContainer
) -> Iterator[av.Packet]:
    return _copied_packets(source, stream, output.add_stream_from_template(stream))


def _copied_packets(
    source: av.container.InputContainer, stream: av.AudioStream, out: av.AudioStream
) -> Iterator[av.Packet]:
    last, begin = None, start_seconds(source)
    for packet in _plain_packets(source, stream):
        if packet.dts is None or (last is not None and packet.dts <= last):  # the end, or a damaged time stamp
            continue
        last = packet.dts
        start = round(begin / packet.time_base)
        packet.pts = (packet.dts if packet.pts is None else packet.pts) - start
        packet.dts -= start
        packet.stream = out
        yield packet


def _plain_packets(source: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.Packet]:
    """AAC that has its header in every packet, as in broadcasts, without. The muxer's own remedy fails in streams."""
    if stream.codec.canonical_name != "aac" or stream.codec_context.extradata:
        yield from packets(source, stream)
        return
    headless = BitStreamFilterContext("aac_adtstoasc", stream)
    for packet in packets(source, stream):
        with suppress(av.FFmpegError):  # a damaged packet, and what comes after the end
            yield from headless.filter(packet)


def _add_encoded(
    source: av.container.InputContainer, stream: av.AudioStream, output: av.container.OutputContainer
) -> Iterator[av.Packet]:
    codec = stream.codec_context
    rate = min((r for r in _AAC_RATES if r >= codec.sample_rate), default=max(_AAC_RATES))
    channels = codec.layout.nb_channels
    out = output.add_stream("aac", rate=rate, layout=_LAYOUTS[min(channels, 6)] if channels in _LAYOUTS else "mono")
    channels = out.layout.nb_channels
    out.bit_rate = min(128_000 if channels == 1 else 96_000 * channels, _BITS_A_SAMPLE * rate * channels)
    return _encoded_packets(sound_in_step(source, stream), out)


def _encoded_packets(chunks: Iterable[Chunk], out: av.AudioStream) -> Iterator[av.Packet]:
    position = 0  # samples; what a container counts in may be too coarse
    for rate, layout, run in _runs(chunks, out):
        resampler = av.AudioResampler("fltp", out.layout, out.rate)
        for frame in chain((_frame(samples, rate, layout) for samples in run), [None]):
            for encodable in filter(None, resampler.resample(frame)):
                encodable.pts, encodable.time_base = position, Fraction(1, out.rate)
                position += encodable.samples
                yield from out.encode(encodable)
    yield from out.encode()


def _runs(
    chunks: Iterable[Chunk], out: av.AudioStream
) -> Iterator[tuple[int, str | av.AudioLayout, Iterator[np.ndarray]]]:
    """(rate, layout, samples (C, N) of each chunk) for as long as rate and layout are the same."""
    for (rate, _), run in groupby(chunks, lambda chunk: (chunk.rate, chunk.layout.name)):
        first = next(run)
        samples = (chunk.samples for chunk in chain([first], run))
        layout = _encodable_layout(first.layout, out)
        if layout is None:
            yield rate, "mono", (part.mean(axis=0, keepdims=True) for part in samples)
        else:
            yield rate, layout, samples


def _encodable_layout(layout: av.AudioLayout, out: av.AudioStream) -> str | av.AudioLayout | None:
    """What channels are to be taken for; None where their mean must do."""
    usual = _LAYOUTS.get(layout.nb_channels)
    if usual is None:
        return None
    try:
        probe = _frame(np.zeros((layout.nb_channels, 1)), out.rate, layout)
        av.AudioResampler("fltp", out.layout, out.rate).resample(probe)
    except av.FFmpegError:  # channels without names, or with such as cannot be mixed
        return usual
    return layout


def _frame(samples: np.ndarray, rate: int, layout: str | av.AudioLayout) -> av.AudioFrame:
    packed = np.ascontiguousarray(samples.clip(-1, 1).astype(np.float32).T).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
    frame.rate = rate
    return frame


# --- Sound from memory -----------------------------------------------------------------------------------------------


def waveform_sound(waveform: torch.Tensor, opus_kbps: int | None = None) -> Soundtrack:
    """16 kHz (N,) in [-1, 1]: lossless, 16 bits a sample, or Opus at that rate."""
    return Soundtrack(partial(_add_waveform, waveform, opus_kbps))


def _add_waveform(
    waveform: torch.Tensor, opus_kbps: int | None, output: av.container.OutputContainer
) -> Iterator[av.Packet]:
    if opus_kbps is None:  # FLAC: lossless, no priming samples, and browsers play it in MP4
        stream = output.add_stream("flac", rate=SAMPLE_RATE, layout="mono", format="s16")
    else:  # long packets: fewer entries in the container's tables
        options = {"frame_duration": "60"}
        stream = output.add_stream("libopus", rate=SAMPLE_RATE, layout="mono", format="s16", options=options)
        stream.bit_rate = 1000 * opus_kbps
    samples = (waveform * 32768).round().clamp(-32768, 32767).to(torch.int16).cpu().numpy()
    return _waveform_packets(samples, stream)


def _waveform_packets(samples: np.ndarray, stream: av.AudioStream) -> Iterator[av.Packet]:
    for begin in range(0, len(samples), SAMPLE_RATE):
        frame = av.AudioFrame.from_ndarray(samples[None, begin : begin + SAMPLE_RATE], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, begin, Fraction(1, SAMPLE_RATE)
        yield from stream.encode(frame)
    yield from stream.encode()
