"""The packaged speech encoder: most of the encoder of OpenAI's Whisper tiny.en, on a window around each frame."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from importlib import resources

import torch
import torch.nn.functional as F
import torchaudio.functional as AF
from safetensors.torch import load_file
from torch import Tensor, nn

from dheads.config import SAMPLE_RATE
from dheads.media.sound import SAMPLES_PER_FRAME
from dheads.speech.interface import SpeechEncoder, stretches

N_FFT, HOP = 400, 160  # Whisper's spectrogram: columns of 25 ms, every 10 ms
_COLUMNS = SAMPLES_PER_FRAME // HOP  # a video frame


def load_whisper() -> WhisperEncoder:
    """The encoder with its packaged weights."""
    encoder = WhisperEncoder()
    with resources.as_file(resources.files("dheads") / "assets" / "whisper_tiny_en_encoder.safetensors") as path:
        weights = load_file(path)
    encoder.load_state_dict({key.removeprefix("encoder."): value.float() for key, value in weights.items()})
    return encoder


class WhisperEncoder(SpeechEncoder):
    """The first three of four blocks of OpenAI's Whisper tiny.en encoder (Radford et al. 2022, section 2.2).

    Each video frame is encoded from the two seconds of sound around it. So an embedding does not depend on sound
    further away, sound may have any length, and shifting the sound by a frame shifts the embeddings by a frame.
    """

    name = "whisper-tiny.en"
    dim = 384
    window = 200  # mel columns (10 ms each) around a video frame
    batch = 16  # windows encoded together: more fit the processor's cache less well

    embedding_mean: Tensor
    embedding_std: Tensor
    positions: Tensor
    mel_filters: Tensor
    hann: Tensor

    def __init__(self, mels: int = 80, heads: int = 6, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(mels, self.dim, 3, padding=1)
        self.conv2 = nn.Conv1d(self.dim, self.dim, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(_Block(self.dim, heads) for _ in range(blocks))
        # Measured over speech in many languages and stored with the weights, for embeddings of about unit variance.
        self.register_buffer("embedding_mean", torch.zeros(self.dim))
        self.register_buffer("embedding_std", torch.ones(self.dim))
        self.register_buffer("positions", _sinusoids(self.window // 2, self.dim), persistent=False)
        filters = AF.melscale_fbanks(
            N_FFT // 2 + 1, 0.0, SAMPLE_RATE / 2, mels, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
        )
        self.register_buffer("mel_filters", filters, persistent=False)
        self.register_buffer("hann", torch.hann_window(N_FFT), persistent=False)

    @torch.inference_mode()
    def encode_pieces(self, pieces: Iterable[Tensor], frames: int | None = None) -> Iterator[Tensor]:
        # Column j of a window is centred on its sample 160 j + 200, encoder position p on column 2 p. The middle of the
        # two central positions, column window / 2 - 1, coincides with the middle of the frame, sample 640 k + 320.
        before = (self.window // 2 - 1) * HOP + N_FFT // 2 - SAMPLES_PER_FRAME // 2
        span = (self.window - 1) * HOP + N_FFT
        for sound, _, _ in stretches(pieces, frames, span, before, self.batch):
            yield self._central(self._positions(self._log_mel(sound.to(self.hann))))

    def _log_mel(self, sound: Tensor) -> Tensor:
        """(N,) -> (mels, columns): log10 of Whisper's mel spectrogram."""
        spectrum = torch.stft(sound, N_FFT, HOP, window=self.hann, center=False, return_complex=True)  # (201, columns)
        return (self.mel_filters.T @ spectrum.abs().square()).clamp(min=1e-10).log10()

    def _positions(self, log_mel: Tensor) -> Tensor:
        """(mels, columns), the windows of B frames -> (B, D, window / 2): the encoder positions of each window."""
        # Whisper's dynamic range, below the maximum of each window: sound outside it must have no influence.
        floors = log_mel.amax(dim=0).unfold(0, self.window, _COLUMNS).amax(dim=1) - 8  # (B,)
        same, counts = floors.unique_consecutive(return_counts=True)
        positions, begin = [], 0
        for floor, count in zip(same, counts.tolist(), strict=True):
            columns = log_mel[:, begin : begin + self.window + (count - 1) * _COLUMNS]
            positions.append(self._windows((torch.maximum(columns, floor) + 4) / 4))
            begin += count * _COLUMNS
        return torch.cat(positions)

    def _windows(self, mel: Tensor) -> Tensor:
        """The same of scaled columns (mels, columns) with one floor.

        Overlapping windows have most positions in common; only the first and the last of each see its padding.
        """
        windows = mel.unfold(1, self.window, _COLUMNS).transpose(0, 1)  # (B, mels, window)
        first, last = self._convolved(windows[..., :4])[..., :1], self._convolved(windows[..., -4:])[..., -1:]
        between = self._convolved(mel[None])[0, :, 1:-1].unfold(1, self.window // 2 - 2, _COLUMNS // 2)
        return torch.cat([first, between.transpose(0, 1), last], dim=2)

    def _convolved(self, mel: Tensor) -> Tensor:
        """(B, mels, columns) -> (B, D, columns / 2)"""
        return F.gelu(self.conv2(F.gelu(self.conv1(mel))))

    def _central(self, positions: Tensor) -> Tensor:
        """(B, D, window / 2) -> (B, D): the mean over the central 40 ms of the last block's output."""
        x = positions.transpose(1, 2).contiguous() + self.positions  # (B, window / 2, D)
        for block in self.blocks[:-1]:
            x = block(x)
        middle = self.window // 4
        x = self.blocks[-1](x, slice(middle - 1, middle + 1))  # (B, 2, D): the other positions are not used
        embeddings: Tensor = (x.mean(dim=1) - self.embedding_mean) / self.embedding_std
        return embeddings


class _Block(nn.Module):
    """A pre-norm transformer block; the names are those of OpenAI's weights."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = _Attention(dim, heads)
        self.attn_ln = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.mlp_ln = nn.LayerNorm(dim)

    def forward(self, x: Tensor, chosen: slice = slice(None)) -> Tensor:
        """(B, T, D) -> (B, t, D), of the t chosen positions."""
        context = self.attn_ln(x)
        x = x[:, chosen] + self.attn(context[:, chosen], context)
        output: Tensor = x + self.mlp(self.mlp_ln(x))
        return output


class _Attention(nn.Module):
    """Multi-head attention; the names are those of OpenAI's weights."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, t, D), some or all of the positions of context (B, T, D) -> (B, t, D)."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, t, D / heads)
        if self.heads * x.shape[1] < context.shape[1]:
            heads = self._few(q, context)
        else:
            k, v = (layer(context).unflatten(-1, (self.heads, -1)) for layer in (self.key, self.value))
            heads = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))
        output: Tensor = self.out(heads.transpose(1, 2).flatten(2))
        return output

    def _few(self, q: Tensor, context: Tensor) -> Tensor:
        """Attention of few queries (B, heads, t, d), which takes less work in another order.

        q (W_k c) = (W_k^T q) c and sum_i a_i (W_v c_i) = W_v (sum_i a_i c_i)
        """
        w_k, w_v = (layer.weight.unflatten(0, (self.heads, -1)) for layer in (self.key, self.value))  # (heads, d, D)
        folded = (q @ w_k).flatten(1, 2)  # (B, heads t, D)
        mixed = F.scaled_dot_product_attention(folded, context, context, scale=q.shape[-1] ** -0.5)
        return mixed.unflatten(1, (self.heads, -1)) @ w_v.mT + self.value.bias.view(1, self.heads, 1, -1)


def _sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim): sin then cos of position x frequency, frequencies from 1 down to 1e-4 in equal ratios."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2) / (dim // 2 - 1))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
