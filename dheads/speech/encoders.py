"""Any file with sound -> mono 16 kHz waveform -> one speech embedding a video frame.

Sound may last hours: it is read and encoded in pieces, and nobody need hold more than one.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import partial
from importlib import resources

import torch
import torch.nn.functional as F
import torchaudio
import torchaudio.functional as AF
from safetensors.torch import load_file
from torch import nn

from dheads.config import SAMPLE_RATE
from dheads.errors import DheadsError
from dheads.media.sound import SAMPLES_PER_FRAME, frame_count, resample
from dheads.weights.checkpoints import fetch, home
from dheads.weights.released import load_script

N_FFT, HOP = 400, 160  # Whisper's spectrogram: columns of 25 ms, every 10 ms


class SpeechEncoder(nn.Module):
    """A frozen network from sound to one embedding a video frame."""

    name: str
    dim: int  # D

    def encode(self, waveform: torch.Tensor, frames: int | None = None) -> torch.Tensor:
        """(N,) 16 kHz -> (F, D) float32; F is `frames`, by default the sound's own length."""
        return torch.cat(list(self.encode_pieces([waveform], frames)))

    def encode_pieces(self, pieces: Iterable[torch.Tensor], frames: int | None = None) -> Iterator[torch.Tensor]:
        """Sound in pieces (n,) of any size -> the same embeddings in chunks (f, D), each as soon as it can be."""
        raise NotImplementedError

    def encode_at(self, tempo: float, waveform: torch.Tensor, frames: int) -> torch.Tensor:
        """What `encode` says of the sound played `tempo` times as fast, and so as high, at each frame's own moment:
        (N,) 16 kHz -> (F, D) float32."""
        ratio = Fraction(1 / tempo).limit_denominator(100)
        count = max(1, round(frames * ratio))
        speech = self.encode(resample(waveform.numpy(), ratio), count)
        # The middle of frame k, k + 1/2, is heard at (k + 1/2) / tempo; in between, embeddings are mixed.
        at = ((torch.arange(frames) + 0.5) * float(ratio) - 0.5).clamp(0, count - 1)
        before = at.long()
        return torch.lerp(speech[before], speech[(before + 1).clamp(max=count - 1)], (at - before)[:, None].to(speech))


def load_speech_encoder(name: str, device: str | torch.device = "cpu", progress: bool = True) -> SpeechEncoder:
    """The frozen encoder of that name, downloaded where it is not packaged. Raises DheadsError, listing the known ones.

    `progress`: whether a download shows a bar.
    """
    if name not in _BUILDERS:
        raise DheadsError(f"unknown speech encoder {name!r}; the known ones are {', '.join(sorted(_BUILDERS))}")
    return _BUILDERS[name](torch.device(device), progress).eval().requires_grad_(False).to(device)


def _stretches(
    pieces: Iterable[torch.Tensor], frames: int | None, window: int, before: int, chunk: int, margin: int = 0
) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Yield (samples (n,), skipped, count): what is heard in `count` frames, `chunk` but at the end.

    Every frame has its `window` of samples, which begins `before` samples ahead of the frame; windows overlap, and
    silence surrounds the sound. The samples are those of `skipped` + count frames and what follows: up to `margin`
    frames more on either side, as far as there are any. frames: how many there are in all; None: as the sound lasts.
    """
    held = torch.zeros(before)  # from the window of frame `begin` on
    begin = done = 0  # frames
    for piece, last in _ended(pieces, frames, window - before):
        held = torch.cat([held, piece])
        there = begin + (len(held) - window) // SAMPLES_PER_FRAME + 1  # frames whose windows are complete
        there = there if frames is None else min(there, frames)
        while done + chunk + margin <= there or (last and done < there):
            end, count = min(done + chunk + margin, there), min(chunk, there - done)
            yield held[: (end - begin - 1) * SAMPLES_PER_FRAME + window], done - begin, count
            done += count
            forgotten = max(0, done - margin) - begin
            held, begin = held[forgotten * SAMPLES_PER_FRAME :], begin + forgotten


def _ended(pieces: Iterable[torch.Tensor], frames: int | None, reach: int) -> Iterator[tuple[torch.Tensor, bool]]:
    """(piece, whether it is the last); the last is silence, as the last frame's window goes `reach` samples beyond its
    begin."""
    samples = 0
    for piece in pieces:
        samples += len(piece)
        yield piece, False
    frames = frame_count(samples) if frames is None else frames
    yield torch.zeros(max(0, (frames - 1) * SAMPLES_PER_FRAME + reach - samples)), True


class WhisperEncoder(SpeechEncoder):
    """The first three of four blocks of OpenAI's Whisper tiny.en encoder (Radford et al. 2022, section 2.2).

    Each video frame is encoded from its own two seconds of sound, so its embedding knows nothing of what is further
    away, sound may have any length, and shifting the sound by a frame shifts the embeddings by a frame.
    """

    name = "whisper-tiny.en"
    dim = 384
    window = 200  # mel columns (10 ms each) around a video frame
    batch = 32  # windows encoded together

    def __init__(self, mels: int = 80, heads: int = 6, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(mels, self.dim, 3, padding=1)
        self.conv2 = nn.Conv1d(self.dim, self.dim, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(_Block(self.dim, heads) for _ in range(blocks))
        # Measured once over speech in many languages, kept with the weights: embeddings of about unit scale.
        self.register_buffer("embedding_mean", torch.zeros(self.dim))
        self.register_buffer("embedding_std", torch.ones(self.dim))
        self.register_buffer("positions", _sinusoids(self.window // 2, self.dim), persistent=False)
        filters = AF.melscale_fbanks(
            N_FFT // 2 + 1, 0.0, SAMPLE_RATE / 2, mels, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
        )
        self.register_buffer("mel_filters", filters, persistent=False)
        self.register_buffer("hann", torch.hann_window(N_FFT), persistent=False)

    @torch.inference_mode()
    def encode_pieces(self, pieces: Iterable[torch.Tensor], frames: int | None = None) -> Iterator[torch.Tensor]:
        # Column j of a window is centred on its sample 160 j + 200, encoder position p on its column 2 p. The middle of
        # the two central positions, column window / 2 - 1, is to lie on the middle of the frame, sample 640 k + 320.
        before = (self.window // 2 - 1) * HOP + N_FFT // 2 - SAMPLES_PER_FRAME // 2
        span = (self.window - 1) * HOP + N_FFT
        for sound, _, _ in _stretches(pieces, frames, span, before, self.batch):
            yield self._central(self._log_mel(sound.to(self.hann)))

    def _log_mel(self, sound: torch.Tensor) -> torch.Tensor:
        """The sound of B windows, each 640 samples after the one before -> (B, mels, window), Whisper's features."""
        spectrum = torch.stft(sound, N_FFT, HOP, window=self.hann, center=False, return_complex=True)  # (201, columns)
        log_mel = (self.mel_filters.T @ spectrum.abs().square()).clamp(min=1e-10).log10()  # (mels, columns)
        windows = log_mel.unfold(1, self.window, SAMPLES_PER_FRAME // HOP).transpose(0, 1)  # (B, mels, window)
        # Whisper's range, below each window's own loudest moment: what is further away must not matter.
        floor = windows.amax(dim=(1, 2), keepdim=True) - 8
        return (torch.maximum(windows, floor) + 4) / 4

    def _central(self, mel: torch.Tensor) -> torch.Tensor:
        """(B, mels, window) -> (B, D): the mean over the central 40 ms of the last block's output."""
        x = F.gelu(self.conv1(mel))
        x = F.gelu(self.conv2(x)).transpose(1, 2) + self.positions  # (B, window / 2, D)
        for block in self.blocks[:-1]:
            x = block(x, x)
        middle = self.window // 4
        x = self.blocks[-1](x[:, middle - 1 : middle + 1], x)  # (B, 2, D): nobody asks for the other positions
        return (x.mean(dim=1) - self.embedding_mean) / self.embedding_std


class _Block(nn.Module):
    """A pre-norm transformer block; the names are those of OpenAI's weights."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = _Attention(dim, heads)
        self.attn_ln = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.mlp_ln = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """x (B, T, D), some or all of the positions of context (B, S, D) -> (B, T, D)."""
        x = x + self.attn(self.attn_ln(x), self.attn_ln(context))
        return x + self.mlp(self.mlp_ln(x))


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(of).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, D / heads)
            for layer, of in ((self.query, x), (self.key, context), (self.value, context))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _sinusoids(length: int, dim: int) -> torch.Tensor:
    """(length, dim): sin then cos of position x frequency, frequencies from 1 down to 1e-4 in equal ratios."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2) / (dim // 2 - 1))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ReleasedEncoder(SpeechEncoder):
    """The authors' encoder: a recurrent network that hears 0.2 s around each frame, and remembers all before."""

    name = "diffused-heads"
    dim = 256
    window = 3_200  # samples: a frame's 640, and 1280 before and after
    chunk = 25  # frames given at once

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script
        self.register_buffer("hidden", torch.zeros(2, 1, 256), persistent=False)  # as every recording begins

    @torch.inference_mode()
    def encode_pieces(self, pieces: Iterable[torch.Tensor], frames: int | None = None) -> Iterator[torch.Tensor]:
        before = (self.window - SAMPLES_PER_FRAME) // 2
        lengths = torch.tensor([self.window])  # on the CPU, as packing sequences demands
        hidden = self.hidden
        for sound, _, _ in _stretches(pieces, frames, self.window, before, self.chunk):
            embeddings = []
            for window in sound.to(self.hidden).unfold(0, self.window, SAMPLES_PER_FRAME):
                embedding, _, hidden = self.script(window[None, None], lengths, init_state=hidden)
                embeddings.append(embedding.flatten())
            yield torch.stack(embeddings)  # (f, 256)


class BundleEncoder(SpeechEncoder):
    """A transformer block's output of one of torchaudio's self-supervised models, the mean over each frame's two."""

    dim = 768
    layer = 6  # of 12: the middle knows most of what is said, the last mostly of the model's own training task
    chunk = 250  # frames encoded at once, with `margin` more on either side for what came before and follows
    margin = 50

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.model = model

    @torch.inference_mode()
    def encode_pieces(self, pieces: Iterable[torch.Tensor], frames: int | None = None) -> Iterator[torch.Tensor]:
        # Output j sees samples 320 j to 320 j + 400. The middle of outputs 2 k and 2 k + 1, sample 640 k + 360, is to
        # lie on the middle of the frame, sample 640 k + 320.
        before, window = 40, SAMPLES_PER_FRAME + 80
        like = next(self.model.parameters())
        for sound, skipped, count in _stretches(pieces, frames, window, before, self.chunk, self.margin):
            x = self.model.extract_features(sound.to(like)[None], num_layers=self.layer)[0][-1][0]  # (2 frames, D)
            yield x.unflatten(0, (-1, 2)).mean(dim=1)[skipped : skipped + count]


def _packaged_whisper(device: torch.device, progress: bool) -> SpeechEncoder:
    encoder = WhisperEncoder()
    with resources.as_file(resources.files("dheads") / "assets" / "whisper_tiny_en_encoder.safetensors") as path:
        weights = load_file(path)
    encoder.load_state_dict({key.removeprefix("encoder."): value.float() for key, value in weights.items()})
    return encoder


def _released(device: torch.device, progress: bool) -> SpeechEncoder:
    # Loaded onto the device, so that tensors inside its code come there too.
    return ReleasedEncoder(load_script(fetch("diffused-heads", progress), device))


def _bundle(device: torch.device, progress: bool, name: str) -> SpeechEncoder:
    # `weights_only`: torchaudio names no hash of its files, so nothing but tensors may be unpickled.
    options = {"model_dir": str(home()), "progress": progress, "weights_only": True}
    try:
        model = _BUNDLES[name].get_model(dl_kwargs=options)
    # What torch throws offline and at files that are cut off or something else.
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise DheadsError(
            f"cannot download or read the speech encoder {name!r} ({(str(error) or repr(error)).splitlines()[0]}); "
            f"put the file of that name in weights.toml into {home()}, or delete the one there if it is damaged"
        ) from error
    return BundleEncoder(name, model)


_BUNDLES = {"hubert-base": torchaudio.pipelines.HUBERT_BASE, "wav2vec2-base": torchaudio.pipelines.WAV2VEC2_BASE}
_BUILDERS: dict[str, Callable[[torch.device, bool], SpeechEncoder]] = {
    "whisper-tiny.en": _packaged_whisper,
    "diffused-heads": _released,
    **{name: partial(_bundle, name=name) for name in _BUNDLES},
}
