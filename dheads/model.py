"""The ADM U-Net with two-stage scale and shift by time and audio (paper sections 3.3 and 3.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dheads.conditioning import Condition, input_channels, network_input
from dheads.config import Config
from dheads.extensions.lips import LipPredictor


@dataclass(frozen=True)
class Output:
    """What the network says about x_t."""

    prediction: Tensor  # (B, 3, H, W) eps, v or x_0
    var_frac: Tensor | None  # (B, 3, H, W), -1 .. 1: posterior variance .. beta
    gates: Tensor | None  # (B, 2, H, W) logits of copying the last motion frame and the identity
    keep: Tensor | None = None  # (B, 1, H, W) logits of keeping what x_t shows


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
    """Scale and shift, (..., C) each, from what time and audio say, (..., 2C) each: 1 + scale, then shift."""
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
        """h (B, C, H, W); modulations: each block's scale and shift; skip (B, C', H, W): what the way down kept."""
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        h = self.res(h, *modulations[:2])
        if self.attn is not None:
            h = self.attn(h)
        return h if self.up is None else self.up(h, *modulations[2:])


class Detail(nn.Module):
    """A shallow network on patches of half the side (beyond the paper): draws what the U-Net's patches leave out.

    Between its patches and its width, a U-Net on patches loses what x_t shows of fine detail, however little noise
    there is. Begins at zero, so that weights without it can be trained on with it.
    """

    def __init__(self, inputs: int, coarse: int, channels: int, outputs: int, blocks: Sequence[ResBlock]) -> None:
        """inputs: of a patch; coarse: the U-Net's width; outputs: of a patch."""
        super().__init__()
        self.stem = nn.Conv2d(inputs, channels, 3, padding=1)
        self.lift = nn.Conv2d(coarse, channels, 1)
        self.layers = nn.ModuleList(Layer(block) for block in blocks)
        self.out_norm = group_norm(channels)
        self.out_conv = zero_init(nn.Conv2d(channels, outputs, 3, padding=1))


class UNet(nn.Module):
    """Predicts the noise (or v) in x_t from x_t, the time and the conditioning."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        net, told = config.model, config.conditioning
        width, area = net.model_channels, net.patch_size**2
        emb_dim = 4 * width
        self.time_embed = mlp(width, emb_dim)
        self.audio_embed = mlp((2 * told.audio_context + 1) * told.speech_dim, emb_dim)
        lip_inputs = (2 * told.lip_context + 1) * told.lip_dims
        self.lip_embed = mlp(lip_inputs, emb_dim) if told.lip_dims else None
        self.eye_embed = None
        if told.eye_dims:
            # At zero, so that weights that know no eye code can be trained on with one.
            self.eye_embed = mlp((2 * told.eye_context + 1) * told.eye_dims, emb_dim)
            zero_init(self.eye_embed[-1])
        self.noise_embed = mlp(width, emb_dim) if told.motion_noise else None
        self.lips = LipPredictor(told) if told.lip_dims else None

        def res(inputs: int, outputs: int, resample: str | None = None) -> ResBlock:
            return ResBlock(inputs, outputs, emb_dim, net.dropout, resample)

        def attn(channels: int, side: int) -> AttentionBlock | None:
            return AttentionBlock(channels, net.head_channels) if side in net.attn_resolutions else None

        self.stem = nn.Conv2d(input_channels(config) * area, width, 3, padding=1)
        self.down = nn.ModuleList()
        channels, side, skips = width, net.image_size // net.patch_size, [width]
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
                outputs = mult * width
                grows = level > 0 and index == net.num_res_blocks
                block = res(channels + skips.pop(), outputs)
                self.up.append(Layer(block, attn(outputs, side), res(outputs, outputs, "up") if grows else None))
                channels = outputs
                side = side * 2 if grows else side

        self.out_norm = group_norm(channels)
        self._splits = [3, 3 if net.learned_variance else 0, 2 if net.copy_gates else 0]
        self.out_conv = zero_init(nn.Conv2d(channels, sum(self._splits) * area, 3, padding=1))
        self.detail = None
        if net.detail_channels:
            fine, blocks = net.detail_channels, [res(net.detail_channels, net.detail_channels) for _ in range(2)]
            area //= 4
            self._splits.append(1)
            self.detail = Detail(input_channels(config) * area, channels, fine, sum(self._splits) * area, blocks)

    def embed_time(self, t: Tensor, motion_noise: Tensor | None) -> Tensor:
        """psi(t) (B,) through its MLP: (B, E), after the SiLU that every block applies first."""
        net = self.config.model
        time_emb = self.time_embed(timestep_embedding(t, net.model_channels, net.max_period))
        if self.noise_embed is not None and motion_noise is not None:
            # The level is scaled to the range of timesteps, so that the same cosines resolve it.
            level = timestep_embedding(1000 * motion_noise, net.model_channels, net.max_period)
            time_emb = time_emb + self.noise_embed(level)
        return F.silu(time_emb)

    def embed_audio(self, condition: Condition) -> Tensor:
        """y_Motion and the codes through their MLPs: (B, E), after the SiLU that every block applies first."""
        audio_emb = self.audio_embed(condition.audio_window.flatten(1))
        if self.lip_embed is not None and condition.lip_window is not None:
            audio_emb = audio_emb + self.lip_embed(condition.lip_window.flatten(1))
        if self.eye_embed is not None and condition.eye_window is not None:
            audio_emb = audio_emb + self.eye_embed(condition.eye_window.flatten(1))
        return F.silu(audio_emb)

    def layers(self) -> list[Layer]:
        """In the order of computation."""
        return [*self.down, *self.middle, *self.up, *(self.detail.layers if self.detail else [])]

    def stems(self) -> list[tuple[nn.Conv2d, int]]:
        """The convolutions that see the input, and the side of the patches that each sees it in."""
        patch = self.config.model.patch_size
        return [(self.stem, patch), *([(self.detail.stem, patch // 2)] if self.detail else [])]

    def _run(self, layer: nn.Module, *inputs: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.training and self.config.training.checkpoint_activations:
            # Only the layer's inputs are kept; the backward pass computes the rest once more, with the same dropout.
            return checkpoint(layer, *inputs, skip=skip, use_reentrant=False)
        return layer(*inputs, skip=skip)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Output:
        """x_t (B, 3, H, W), t (B,) original timesteps."""
        time_emb, audio_emb = self.embed_time(t, condition.motion_noise), self.embed_audio(condition)
        modulations = [
            [part for b in layer.blocks() for part in modulation(b.time_affine(time_emb), b.audio_affine(audio_emb))]
            for layer in self.layers()
        ]
        picture = network_input(self.config, x_t, condition)
        return self.denoise([stem(F.pixel_unshuffle(picture, patch)) for stem, patch in self.stems()], modulations)

    def denoise(self, stems: Sequence[Tensor], modulations: Sequence[Sequence[Tensor]]) -> Output:
        """From what each of `stems` says, (B, C, H', W') each, and each layer's scales and shifts to the network's
        words."""
        told, h = iter(modulations), stems[0]
        skips = [h]
        for layer in self.down:
            h = self._run(layer, h, *next(told))
            skips.append(h)
        for layer in self.middle:
            h = self._run(layer, h, *next(told))
        for layer in self.up:
            h = self._run(layer, h, *next(told), skip=skips.pop())
        h = F.silu(self.out_norm(h))
        words = F.pixel_shuffle(self.out_conv(h), self.config.model.patch_size)  # (B, 3 + 3 + 2, H, W)
        if self.detail is not None:
            fine = stems[1] + F.interpolate(self.detail.lift(h), scale_factor=2, mode="nearest")
            for layer in self.detail.layers:
                fine = self._run(layer, fine, *next(told))
            fine = self.detail.out_conv(F.silu(self.detail.out_norm(fine)))
            fine = F.pixel_shuffle(fine, self.config.model.patch_size // 2)  # (B, 3 + 3 + 2 + 1, H, W)
            words = fine + F.pad(words, (0, 0, 0, 0, 0, 1))
        prediction, var_frac, gates, *keep = words.split(self._splits, dim=1)
        return Output(
            prediction,
            var_frac if self._splits[1] else None,
            gates if self._splits[2] else None,
            keep[0] if keep else None,
        )
