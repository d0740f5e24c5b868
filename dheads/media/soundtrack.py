"""The sound of a written video: copied bit for bit, or encoded to AAC, which plays everywhere."""

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
from dheads.media.containers import Chunk, audio_stream, name_of, opened, packets, sound_in_step, start_seconds
from dheads.media.hearing import played_stream

# Codecs that MP4 can hold and browsers play. Other players do not play all: MP3, FLAC and Opus are silent in QuickTime,
# on iPhones or in Windows' player, and ALAC outside Apple's products.
_COPIED = {"aac": "AAC", "mp3": "MP3", "alac": "ALAC", "flac": "FLAC", "opus": "Opus"}
# By FFmpeg's name of the container: its usual name, and the codecs that it holds.
_HELD = {"mp4": ("MP4", set(_COPIED)), "mov": ("MOV", {"aac", "mp3", "alac"}), "ipod": ("M4V", {"aac", "alac"})}
_MIN_MP3_RATE = 16_000  # MP4 does not define MP3 of lower sample rates ("MPEG 2.5")
# Windows' decoder plays AAC of up to 48 kHz and 5.1 channels.
_AAC_RATES = (48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}  # by number of channels
_MAX_BITS_PER_SAMPLE = 6  # of each channel of AAC


@dataclass(frozen=True)
class Soundtrack:
    """The sound of one video."""

    # Adds the sound stream to a container and returns the packets to mux.
    add: Callable[[av.container.OutputContainer], Iterator[av.Packet[av.AudioStream]]]
    notes: list[str] = field(default_factory=list)  # sentences for the user


def no_sound() -> Soundtrack:
    """The soundtrack of a silent video: no stream and no packets."""
    return Soundtrack(lambda output: iter(()))


# --- The sound of a file ---------------------------------------------------------------------------------------------


@contextmanager
def source_sound(audio: Path | BinaryIO, codec: AudioCodec, container: str = "mp4") -> Iterator[Soundtrack]:
    """The sound of a file. LC-AAC is copied; codec "copy" also copies all else that the container can hold. Other sound
    is encoded to AAC.

    container: FFmpeg's name of it. Raises DheadsError for unreadable sound.
    """
    name, index = name_of(audio, "the given sound"), played_stream(audio)
    with opened(audio, name, "sound or video") as source:
        stream = audio_stream(source, index)
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
    """The name of a codec in messages; for AAC, which has several profiles, the profile."""
    name = codec.codec.canonical_name
    if name == "aac" and codec.profile:  # such as LC, HE-AAC
        return codec.profile if "AAC" in codec.profile else f"{codec.profile}-AAC"
    return _COPIED.get(name, name)


def _fits(codec: av.AudioCodecContext, container: str) -> bool:
    """Whether a container can hold a copy of this sound."""
    name = codec.codec.canonical_name
    if name not in _HELD[container][1]:
        return False
    if name == "mp3":
        return codec.sample_rate >= _MIN_MP3_RATE
    # MP4 needs the codec's header, which damaged files lack; for AAC it can be made from the header of each packet.
    return bool(codec.extradata or (name == "aac" and codec.profile))


def _add_copy(
    source: av.container.InputContainer, stream: av.AudioStream, output: av.container.OutputContainer
) -> Iterator[av.Packet[av.AudioStream]]:
    return _copied_packets(source, stream, output.add_stream_from_template(stream))


def _copied_packets(
    source: av.container.InputContainer, stream: av.AudioStream, out: av.AudioStream
) -> Iterator[av.Packet[av.AudioStream]]:
    last, begin = None, start_seconds(source)
    for packet in _plain_packets(source, stream):
        if packet.dts is None or (last is not None and packet.dts <= last):  # the flush packet or a damaged time stamp
            continue
        last = packet.dts
        start = round(begin / packet.time_base)
        packet.pts = (packet.dts if packet.pts is None else packet.pts) - start
        packet.dts -= start
        packet.stream = out
        yield packet


def _plain_packets(source: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.Packet[av.AudioStream]]:
    """The packets of a stream; AAC with a header in every packet, as in broadcasts, is stripped of them.

    The muxer strips them too, but fails to in fragmented MP4.
    """
    if stream.codec.canonical_name != "aac" or stream.codec_context.extradata:
        yield from packets(source, stream)
        return
    bare = BitStreamFilterContext("aac_adtstoasc", stream)
    for packet in packets(source, stream):
        with suppress(av.FFmpegError):  # a damaged packet, or one after the end
            yield from bare.filter(packet)


def _add_encoded(
    source: av.container.InputContainer, stream: av.AudioStream, output: av.container.OutputContainer
) -> Iterator[av.Packet[av.AudioStream]]:
    codec = stream.codec_context
    rate = min((r for r in _AAC_RATES if r >= codec.sample_rate), default=max(_AAC_RATES))
    channels = codec.layout.nb_channels
    out = output.add_stream("aac", rate=rate, layout=_LAYOUTS[min(channels, 6)] if channels in _LAYOUTS else "mono")
    channels = out.layout.nb_channels
    out.bit_rate = min(128_000 if channels == 1 else 96_000 * channels, _MAX_BITS_PER_SAMPLE * rate * channels)
    return _encoded_packets(sound_in_step(source, stream), out)


def _encoded_packets(chunks: Iterable[Chunk], out: av.AudioStream) -> Iterator[av.Packet[av.AudioStream]]:
    position = 0  # in samples: the source's time base may be too coarse
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
    """Runs of chunks of one rate and layout: (rate, layout, samples (C, N) of each chunk)."""
    for (rate, _), run in groupby(chunks, lambda chunk: (chunk.rate, chunk.layout.name)):
        first = next(run)
        samples = (chunk.samples for chunk in chain([first], run))
        layout = _encodable_layout(first.layout, out)
        if layout is None:
            yield rate, "mono", (part.mean(axis=0, keepdims=True) for part in samples)
        else:
            yield rate, layout, samples


def _encodable_layout(layout: av.AudioLayout, out: av.AudioStream) -> str | av.AudioLayout | None:
    """The layout as which channels are encoded; None if only their mean can be."""
    usual = _LAYOUTS.get(layout.nb_channels)
    if usual is None:
        return None
    try:
        probe = _frame(np.zeros((layout.nb_channels, 1)), out.rate, layout)
        av.AudioResampler("fltp", out.layout, out.rate).resample(probe)
    except av.FFmpegError:  # channels without names, or of names that cannot be mixed
        return usual
    return layout


def _frame(samples: np.ndarray, rate: int, layout: str | av.AudioLayout) -> av.AudioFrame:
    """A frame of samples (C, N), clipped to [-1, 1]."""
    packed = np.ascontiguousarray(samples.clip(-1, 1).astype(np.float32).T).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
    frame.rate = rate
    return frame


# --- Sound from memory -----------------------------------------------------------------------------------------------


def waveform_sound(waveform: torch.Tensor, opus_kbps: int | None = None) -> Soundtrack:
    """The soundtrack of a waveform (N,) at 16 kHz in [-1, 1]: 16-bit lossless, or Opus of `opus_kbps` kbit/s."""
    return Soundtrack(partial(_add_waveform, waveform, opus_kbps))


def _add_waveform(
    waveform: torch.Tensor, opus_kbps: int | None, output: av.container.OutputContainer
) -> Iterator[av.Packet[av.AudioStream]]:
    if opus_kbps is None:  # FLAC: lossless, no priming samples, and browsers play it in MP4
        stream = output.add_stream("flac", rate=SAMPLE_RATE, layout="mono", format="s16")
    else:  # long packets, so fewer entries in the container's tables
        options = {"frame_duration": "60"}
        stream = output.add_stream("libopus", rate=SAMPLE_RATE, layout="mono", format="s16", options=options)
        stream.bit_rate = 1000 * opus_kbps
    samples = (waveform * 32768).round().clamp(-32768, 32767).to(torch.int16).cpu().numpy()
    return _waveform_packets(samples, stream)


def _waveform_packets(samples: np.ndarray, stream: av.AudioStream) -> Iterator[av.Packet[av.AudioStream]]:
    for begin in range(0, len(samples), SAMPLE_RATE):
        frame = av.AudioFrame.from_ndarray(samples[None, begin : begin + SAMPLE_RATE], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, begin, Fraction(1, SAMPLE_RATE)
        yield from stream.encode(frame)
    yield from stream.encode()
