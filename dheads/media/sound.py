"""Sound as speech encoders hear it: 16 kHz, mono, with the picture's zero, in pieces or whole."""

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
import torchaudio.functional as AF

from dheads.config import FPS, SAMPLE_RATE
from dheads.errors import DheadsError
from dheads.media.containers import name_of, opened, sound_in_step, start_seconds
from dheads.media.hearing import Hearing, hear

SAMPLES_PER_FRAME = SAMPLE_RATE // FPS  # 640


def load_waveform(source: Path | BinaryIO) -> torch.Tensor:
    """(N,) float32, mono as `hearing` has it, 16 kHz, in [-1, 1]: the sound of any file that FFmpeg reads.

    A stream is read from its beginning. Sample 0 is at the container's time 0, the zero of `video.read_frames`: sound
    that starts late is preceded by silence, and an encoder's priming samples are left out. Damaged packets are skipped.
    Raises DheadsError for a missing or unreadable file, for one without sound, and for more than three hours.
    """
    return torch.cat(list(waveform_pieces(source)))


def waveform_pieces(source: Path | BinaryIO, hearing: Hearing | None = None) -> Iterator[torch.Tensor]:
    """What `load_waveform` gives, as pieces (n,) of about a minute; the file is open until the last.

    hearing: what `hear` says of the file, if that is known. Raises DheadsError as `load_waveform` does: with the first
    piece, but for sound that is found to be too long.
    """
    hearing = hearing or hear(source)
    name = name_of(source, "the given sound")
    with opened(source, name, "sound or video") as container:
        chunks = sound_in_step(container, container.streams[hearing.stream])
        empty = True
        # The resampler starts anew where the sample rate changes.
        for rate, run in groupby(chunks, key=attrgetter("rate")):
            for piece in _resampled((hearing.mono(chunk.samples) for chunk in run), rate):
                if len(piece):
                    empty = False
                    yield hearing.amplified(piece).clamp(-1, 1)
        if empty:
            raise DheadsError(f"{name} holds no sound: its sound stream is empty or cannot be decoded")


def claimed_seconds(source: Path | BinaryIO, hearing: Hearing) -> float | None:
    """How long the sound lasts as its container claims, which may be wrong; None where it says nothing.

    Raises DheadsError for a missing or unreadable file.
    """
    with opened(source, name_of(source, "the given sound"), "sound or video") as container:
        stream = container.streams[hearing.stream]
        if stream.duration is not None:
            end = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
            return end - start_seconds(container)
        return None if container.duration is None else container.duration / av.time_base


def _resampled(chunks: Iterable[np.ndarray], rate: int) -> Iterator[torch.Tensor]:
    """Chunks of one rate -> 16 kHz, a minute at a time, as if at once: hours at a high rate would fill the memory."""
    # The filter bank has numerator x denominator taps: an odd rate (44,101 Hz) must not ask for gigabytes.
    ratio = Fraction(SAMPLE_RATE, rate).limit_denominator(2000)
    unit = ratio.denominator  # samples after which the filters repeat
    margin = 8 * unit  # the filters reach less far
    held, length, given = [], 0, 0  # what waits, its samples, and how many of them are there for their neighbours only
    for chunk in chunks:
        held.append(chunk)
        length += len(chunk)
        if length > 60 * rate:
            samples = np.concatenate(held)
            ready = (length - margin) // unit * unit
            yield resample(samples, ratio)[int(given * ratio) : int(ready * ratio)]
            held, length, given = [samples[ready - margin :]], length - ready + margin, margin
    yield resample(np.concatenate(held), ratio)[int(given * ratio) :]


def resample(samples: np.ndarray, ratio: Fraction) -> torch.Tensor:
    return AF.resample(torch.from_numpy(samples), ratio.denominator, ratio.numerator)


def wav_file(waveform: torch.Tensor) -> io.BytesIO:
    """A WAV file, 16 bits a sample, of (N,) at 16 kHz in [-1, 1]."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        writer.writeframes((waveform * 32767).round().clamp(-32768, 32767).to(torch.int16).cpu().numpy().tobytes())
    file.seek(0)
    return file


def in_a_room(pieces: Iterable[torch.Tensor], level: float) -> Iterator[torch.Tensor]:
    """The sound (n,) with noise of this standard deviation, the same for the same sound."""
    generator = torch.Generator().manual_seed(0)
    for piece in pieces:
        yield piece + level * torch.randn(piece.shape, generator=generator) if level else piece


def frame_count(samples: int) -> int:
    """How many video frames at 25 fps so many samples of 16 kHz last; at least one."""
    return max(1, round(samples / SAMPLES_PER_FRAME))
