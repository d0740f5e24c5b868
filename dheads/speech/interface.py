"""The interface of all speech encoders: 16 kHz mono sound to one embedding a video frame.

Sound may last hours: it is read and encoded in pieces, and is never in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction

import torch
from torch import Tensor, nn

from dheads.media.sound import SAMPLES_PER_FRAME, frame_count, resample


class SpeechEncoder(nn.Module):
    """A frozen network from sound to one embedding a video frame."""

    name: str
    dim: int  # D

    def encode(self, waveform: Tensor, frames: int | None = None) -> Tensor:
        """(N,) 16 kHz -> (F, D) float32; F is `frames`, by default the number of frames that the sound lasts."""
        return torch.cat(list(self.encode_pieces([waveform], frames)))

    def encode_pieces(self, pieces: Iterable[Tensor], frames: int | None = None) -> Iterator[Tensor]:
        """The same embeddings from sound in pieces (n,) of any size, in chunks (f, D), each as early as possible."""
        raise NotImplementedError

    def encode_at(self, tempo: float, waveform: Tensor, frames: int) -> Tensor:
        """The embeddings of the sound played `tempo` times as fast, and so as high, at the times of the given frames.

        (N,) 16 kHz -> (F, D) float32.
        """
        ratio = Fraction(1 / tempo).limit_denominator(100)
        count = max(1, round(frames * ratio))
        speech = self.encode(resample(waveform.numpy(), ratio), count)
        # The middle of frame k, k + 1/2, is heard at (k + 1/2) / tempo; between two embeddings, interpolate.
        at = ((torch.arange(frames) + 0.5) * float(ratio) - 0.5).clamp(0, count - 1)
        before = at.long()
        return torch.lerp(speech[before], speech[(before + 1).clamp(max=count - 1)], (at - before)[:, None].to(speech))


def stretches(
    pieces: Iterable[Tensor], frames: int | None, window: int, before: int, chunk: int, margin: int = 0
) -> Iterator[tuple[Tensor, int, int]]:
    """Cut sound in pieces (n,) into stretches of `chunk` frames, the last one shorter.

    Every frame has a window of `window` samples, which begins `before` samples ahead of the frame. Windows overlap,
    and beyond both ends of the sound there is silence. Yields (samples, skipped, count): the windows of `count` new
    frames, preceded by those of `skipped` frames and followed by those of others, up to `margin` on either side as
    far as there are any. frames: their total number; None: as long as the sound.
    """
    held = torch.zeros(before)  # samples from the window of frame `begin` on
    begin = done = 0  # frames
    for piece, last in _with_end(pieces, frames, window - before):
        held = torch.cat([held, piece])
        there = begin + (len(held) - window) // SAMPLES_PER_FRAME + 1  # frames with complete windows
        there = there if frames is None else min(there, frames)
        while done + chunk + margin <= there or (last and done < there):
            end, count = min(done + chunk + margin, there), min(chunk, there - done)
            yield held[: (end - begin - 1) * SAMPLES_PER_FRAME + window], done - begin, count
            done += count
            dropped = max(0, done - margin) - begin
            held, begin = held[dropped * SAMPLES_PER_FRAME :], begin + dropped


def _with_end(pieces: Iterable[Tensor], frames: int | None, reach: int) -> Iterator[tuple[Tensor, bool]]:
    """Yield (piece, whether it is the last). The last is the silence that completes the last frame's window.

    A frame's window ends `reach` samples after the frame's begin.
    """
    samples = 0
    for piece in pieces:
        samples += len(piece)
        yield piece, False
    frames = frame_count(samples) if frames is None else frames
    yield torch.zeros(max(0, (frames - 1) * SAMPLES_PER_FRAME + reach - samples)), True
