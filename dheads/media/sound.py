"""Sound for speech encoders: 16 kHz mono from the container's time 0 on, whole or in pieces."""

from __future__ import annotations

import io
import wave
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
import torch.nn.functional as F
import torchaudio.functional as AF

from dheads.config import FPS, SAMPLE_RATE
from dheads.errors import DheadsError
from dheads.media.containers import audio_stream, name_of, opened, sound_in_step, start_seconds
from dheads.media.hearing import Hearing, hear

SAMPLES_PER_FRAME = SAMPLE_RATE // FPS  # 640


def load_waveform(source: Path | BinaryIO) -> torch.Tensor:
    """The sound of any file that FFmpeg reads: (N,) float32 in [-1, 1], 16 kHz, mono as `hearing` chooses it.

    A stream is read from its beginning. Sample 0 is at the container's time 0, as frame 0 of `reading.read_frames` is:
    sound that starts late is preceded by silence, and an encoder's priming samples are left out. Damaged packets are
    skipped. Raises DheadsError for a missing or unreadable file, for one without sound, and for more than three hours.
    """
    return torch.cat(list(waveform_pieces(source)))


def waveform_pieces(source: Path | BinaryIO, hearing: Hearing | None = None) -> Iterator[torch.Tensor]:
    """The waveform of `load_waveform` in pieces (n,) of about a minute; the file is open until the last.

    hearing: the result of `hear` for this file; None measures it first. Raises DheadsError as `load_waveform` does,
    before the first piece, except for sound that proves too long.
    """
    hearing = hearing or hear(source)
    name = name_of(source, "the given sound")
    with opened(source, name, "sound or video") as container:
        chunks = sound_in_step(container, audio_stream(container, hearing.stream))
        empty = True
        # The resampler starts again when the sample rate changes.
        for rate, run in groupby(chunks, key=attrgetter("rate")):
            for piece in _resampled((hearing.mono(chunk.samples) for chunk in run), rate):
                if len(piece):
                    empty = False
                    yield hearing.amplified(piece).clamp(-1, 1)
        if empty:
            raise DheadsError(f"{name} holds no sound: its sound stream is empty or cannot be decoded")


def claimed_seconds(source: Path | BinaryIO, hearing: Hearing) -> float | None:
    """The length of the sound by its container's header, which may be wrong; None if it states none.

    Raises DheadsError for a missing or unreadable file.
    """
    with opened(source, name_of(source, "the given sound"), "sound or video") as container:
        stream = audio_stream(container, hearing.stream)
        if stream.duration is not None and stream.time_base is not None:
            end = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
            return end - start_seconds(container)
        return None if container.duration is None else container.duration / av.time_base


def _resampled(chunks: Iterable[np.ndarray], rate: int) -> Iterator[torch.Tensor]:
    """Chunks (n,) of one rate -> 16 kHz, a minute at a time to bound the memory; joined, as if done at once."""
    # The filter bank has numerator x denominator taps: for an odd rate such as 44,101 Hz it would take gigabytes.
    ratio = Fraction(SAMPLE_RATE, rate).limit_denominator(2000)
    unit = ratio.denominator  # input samples after which the filters repeat
    margin = 8 * unit  # more than the filters' half width
    held: list[np.ndarray] = []
    length, done = 0, 0  # samples held, and how many of the first of them are resampled already
    for chunk in chunks:
        held.append(chunk)
        length += len(chunk)
        if length > 60 * rate:
            samples = np.concatenate(held)
            ready = (length - margin) // unit * unit
            yield resample(samples, ratio)[int(done * ratio) : int(ready * ratio)]
            held, length, done = [samples[ready - margin :]], length - ready + margin, margin
    yield resample(np.concatenate(held), ratio)[int(done * ratio) :]


def resample(samples: np.ndarray, ratio: Fraction) -> torch.Tensor:
    """Samples (n,) at `ratio` times their sample rate."""
    resampled: torch.Tensor = AF.resample(torch.from_numpy(samples), ratio.denominator, ratio.numerator)
    return resampled


def delayed(waveform: torch.Tensor, seconds: float) -> torch.Tensor:
    """A waveform (N,) at 16 kHz that comes `seconds` later, or earlier if below zero; what it lacks is silence."""
    samples = max(-len(waveform), min(round(seconds * SAMPLE_RATE), len(waveform)))
    return F.pad(waveform, (samples, -samples))


def wav_file(waveform: torch.Tensor) -> io.BytesIO:
    """A 16-bit WAV file of a waveform (N,) at 16 kHz in [-1, 1]."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        writer.writeframes((waveform * 32767).round().clamp(-32768, 32767).to(torch.int16).cpu().numpy().tobytes())
    file.seek(0)
    return file


def add_noise(pieces: Iterable[torch.Tensor], level: float) -> Iterator[torch.Tensor]:
    """Sound in pieces (n,) with white noise of standard deviation `level` added; the noise is always the same."""
    generator = torch.Generator().manual_seed(0)
    for piece in pieces:
        yield piece + level * torch.randn(piece.shape, generator=generator) if level else piece


def frame_count(samples: int) -> int:
    """The number of video frames at 25 fps in the duration of `samples` samples at 16 kHz; at least 1."""
    return max(1, round(samples / SAMPLES_PER_FRAME))
