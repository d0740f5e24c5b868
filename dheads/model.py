"""The ADM U-Net with two-stage scale and shift by time and audio (paper sections 3.3 and 3.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dheads.conditioning import Condition, Cues, input_channels, network_input
from dheads.config import Config
from dheads.diffusion import Schedule


@dataclass(frozen=True)
class Output:
    """The network's raw output for x_t."""

    prediction: Tensor  # (B, 3, H, W) eps, v or x_0
    var_frac: Tensor | None  # (B, 3, H, W), -1 .. 1: posterior variance .. beta


def timestep_embedding(t: Tensor, dim: int, max_period: float) -> Tensor:
    """cos and sin of t exp(-ln(P) i / (C/2)), i < C/2: (B,) -> (B, C)."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * freqs  # (B, C/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)


def zero_init(module: nn.Module) -> nn.Module:
    """Start at zero, so that every residual branch begins as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.SiLU(), nn.Linear(outputs, outputs))


def modulation(time: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift, (..., C) each, by the projections (..., 2C) of the time and audio embeddings."""
    t_s, t_b = time.chunk(2, dim=-1)
    y_s, y_b = audio.chunk(2, dim=-1)
    # y_s (t_s h + t_b) + y_b = (y_s t_s) h + (y_s t_b + y_b)
    return (1 + y_s) * (1 + t_s), torch.addcmul(y_b, 1 + y_s, t_b)


class ResBlock(nn.Module):
    """Residual block; `resample` "up" or "down" changes the resolution inside."""

    def __init__(self, inputs: int, outputs: int, emb_dim: int, dropout: float, resample: str | None = None) -> None:
        super().__init__()
        self.resample = resample
        self.in_norm = group_norm(inputs)
        self.in_conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_affine = nn.Linear(emb_dim, 2 * outputs)
        self.audio_affine = nn.Linear(emb_dim, 2 * outputs)
        self.out_norm = group_norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.out_conv = zero_init(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x (B, C, H, W); scale and shift (B, C'), by time and audio."""
        h = self.in_conv(self._resample(F.silu(self.in_norm(x))))  # (B, C', H', W')
        # h' = y_s (t_s GN(h) + t_b) + y_b
        h = torch.addcmul(shift[:, :, None, None], self.out_norm(h), scale[:, :, None, None])
        return self.skip(self._resample(x)) + self.out_conv(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Self-attention over all pixels."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # (B, C, HW)
        qkv = self.qkv(self.norm(flat)).unflatten(1, (self.heads, -1))  # (B, heads, 3c, HW): q, k, v of head 0, ...
        q, k, v = qkv.transpose(2, 3).chunk(3, dim=3)  # (B, heads, HW, c)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, HW, c)
        return x + self.proj(h.transpose(2, 3).flatten(1, 2)).view_as(x)


class Layer(nn.Module):
    """A residual block, attention where the resolution has it, and on the way up the block that doubles the side."""

    def __init__(self, res: ResBlock, attn: AttentionBlock | None = None, up: ResBlock | None = None) -> None:
        super().__init__()
        self.res, self.attn, self.up = res, attn, up

    def blocks(self) -> list[ResBlock]:
        return [self.res] if self.up is None else [self.res, self.up]

    def forward(self, h: Tensor, *modulations: Tensor, skip: Tensor | None = None) -> Tensor:
        """h (B, C, H, W); modulations: each block's scale and shift; skip (B, C', H, W): features of the way down."""
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        h = self.res(h, *modulations[:2])
        if self.attn is not None:
            h = self.attn(h)
        return h if self.up is None else self.up(h, *modulations[2:])


class UNet(nn.Module):
    """Predicts the noise (or v, or x_0) in x_t from x_t, the timestep and the condition."""

    def __init__(
        self, config: Config, inputs: int | None = None, outputs: int | None = None, side: int | None = None
    ) -> None:
        """inputs, outputs: channels; side: resolution, px. By default those of the picture, as in the paper."""
        super().__init__()
        self.config = config
        net, cond = config.network, config.conditioning
        width, emb_dim = net.model_channels, 4 * net.model_channels
        inputs, side = inputs or input_channels(config), side or net.image_size
        outputs = outputs or (6 if net.learned_variance else 3)
        self.time_embed = mlp(width, emb_dim)
        self.audio_embed = mlp((2 * cond.audio_context + 1) * cond.speech_dim, emb_dim)
        self._add_embeddings(emb_dim)

        def res(inputs: int, outputs: int, resample: str | None = None) -> ResBlock:
            return ResBlock(inputs, outputs, emb_dim, net.dropout, resample)

        def attn(channels: int, side: int) -> AttentionBlock | None:
            return AttentionBlock(channels, net.head_channels) if side in net.attn_resolutions else None

        self.stem = nn.Conv2d(inputs, width, 3, padding=1)
        self.down = nn.ModuleList()
        channels, skips = width, [width]
        for level, mult in enumerate(net.channel_mult):
            for _ in range(net.num_res_blocks):
                self.down.append(Layer(res(channels, mult * width), attn(mult * width, side)))
                channels = mult * width
                skips.append(channels)
            if level < len(net.channel_mult) - 1:
                self.down.append(Layer(res(channels, channels, "down")))
                side //= 2
                skips.append(channels)

        self.middle = nn.ModuleList(
            [
                Layer(res(channels, channels), AttentionBlock(channels, net.head_channels)),
                Layer(res(channels, channels)),
            ]
        )

        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(net.channel_mult))):
            for index in range(net.num_res_blocks + 1):
                level_width, grows = mult * width, level > 0 and index == net.num_res_blocks
                block, attention = res(channels + skips.pop(), level_width), attn(level_width, side)
                self.up.append(Layer(block, attention, res(level_width, level_width, "up") if grows else None))
                channels = level_width
                side = side * 2 if grows else side

        self.out_norm = group_norm(channels)
        self.out_conv = zero_init(nn.Conv2d(channels, outputs, 3, padding=1))

    def _add_embeddings(self, emb_dim: int) -> None:
        """For networks that are given more: their embeddings, before the layers."""

    def embed_time(self, t: Tensor) -> Tensor:
        """psi(t) (B,) through its MLP: (B, E), after the SiLU that every block applies first."""
        net = self.config.network
        return F.silu(self.time_embed(timestep_embedding(t, net.model_channels, net.max_period)))

    def embed_audio(self, cues: Cues) -> Tensor:
        """y_Motion through its MLP: (B, E), after the SiLU that every block applies first."""
        return F.silu(self.audio_embed(cues.audio_window.flatten(1)))

    def layers(self) -> list[Layer]:
        """In the order of computation."""
        return [*self.down, *self.middle, *self.up]

    def modulations(self, time_emb: Tensor, audio_emb: Tensor) -> list[list[Tensor]]:
        """For each layer the scale and shift (B, C) of each of its blocks."""
        return [
            [part for b in layer.blocks() for part in modulation(b.time_affine(time_emb), b.audio_affine(audio_emb))]
            for layer in self.layers()
        ]

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Output:
        """x_t (B, 3, H, W), t (B,) original timesteps."""
        time_emb, audio_emb = self.embed_time(t), self.embed_audio(condition.cues)  # (B, E) each
        x_in = network_input(self.config, x_t, condition)  # x_t, motion frames and x_Id as channels
        h = self.features(self.stem(x_in), self.modulations(time_emb, audio_emb))  # (B, C, H, W)
        prediction, *var_frac = self.out_conv(h).split(3, dim=1)
        return Output(prediction, var_frac[0] if var_frac else None)

    def features(self, h: Tensor, modulations: list[list[Tensor]]) -> Tensor:
        """The stem's output (B, C, H, W) through all levels, down and up again: (B, C, H, W)."""
        scales_and_shifts = iter(modulations)
        skips = [h]
        for layer in self.down:
            h = self._run(layer, h, *next(scales_and_shifts))
            skips.append(h)
        for layer in self.middle:
            h = self._run(layer, h, *next(scales_and_shifts))
        for layer in self.up:
            h = self._run(layer, h, *next(scales_and_shifts), skip=skips.pop())
        return F.silu(self.out_norm(h))

    def _run(self, layer: nn.Module, *inputs: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.training and self.config.run.checkpoint_activations:
            # Only the layer's inputs are kept; the backward pass computes the rest once more, with the same dropout.
            return checkpoint(layer, *inputs, skip=skip, use_reentrant=False)
        return layer(*inputs, skip=skip)

    def compose(
        self, schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor | int, output: Output, condition: Condition
    ) -> Tensor:
        """The x_0 (B, 3, H, W) that the solver takes, of the one that is predicted: in the paper the same."""
        return x_0
