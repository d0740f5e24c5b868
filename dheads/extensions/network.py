"""The U-Net with every extension: patches, detail, copy gates, codes, and the level of noise on motion frames.

With an empty `[extensions]` table it is the paper's network. The names of its weights are the same with and without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dheads.conditioning import Condition, Cues, input_channels, network_input
from dheads.config import Config
from dheads.diffusion import Schedule
from dheads.extensions.codes import Code, codes_of
from dheads.extensions.copying import blend_copies, mouth_mask
from dheads.extensions.detail import Detail, keep_seen
from dheads.extensions.head_motion import HeadMotion
from dheads.extensions.lips import LipCode, LipPredictor
from dheads.extensions.motion import MotionCondition
from dheads.extensions.mouth import MouthNetwork
from dheads.extensions.pose import PoseCode
from dheads.extensions.warp import blended, sampled, taken_from
from dheads.model import Layer, Output, ResBlock, UNet, mlp, timestep_embedding, zero_init


@dataclass(frozen=True)
class ExtendedOutput(Output):
    """The raw output with what extensions predict."""

    # (B, 2, H, W) logits of copying the last motion frame and the identity, or the photo in place and moved (warp.py)
    gates: Tensor | None = None
    keep: Tensor | None = None  # (B, 1, H, W) logits of keeping the detail of x_t
    flow: Tensor | None = None  # (B, 2, h, w) px, where the photo moves beyond its pose


class ExtendedUNet(UNet):
    """The paper's U-Net with the extensions that the configuration turns on."""

    def __init__(self, config: Config) -> None:
        net, patches = config.network, config.extensions.patches
        has_flow = config.extensions.warp.flow
        has_gates = config.extensions.copying.gates or has_flow
        splits = [3, 3 if net.learned_variance else 0, 2 if has_gates else 0]
        inputs, area = input_channels(config) + (3 if has_flow else 0), patches.size**2
        self.codes: list[Code] = codes_of(config)
        super().__init__(config, inputs * area, sum(splits) * area, net.image_size // patches.size)
        self._splits, self.detail = splits, None
        width = net.channel_mult[0] * net.model_channels
        self.flow_head = zero_init(nn.Conv2d(width, 2, 3, padding=1)) if has_flow else None
        self.mouth: MouthNetwork | None = None
        if config.extensions.mouth.channels:  # trained apart from the rest
            self.mouth = MouthNetwork(config.extensions.mouth.channels).requires_grad_(False)
        if patches.detail_channels:
            fine, emb_dim, area = patches.detail_channels, 4 * net.model_channels, area // 4
            blocks = [ResBlock(fine, fine, emb_dim, net.dropout) for _ in range(2)]
            splits.append(1)
            self.detail = Detail(inputs * area, width, fine, sum(splits) * area, blocks)

    def _add_embeddings(self, emb_dim: int) -> None:
        for code in self.codes:
            context = self.config.extensions.codes[code.name].context
            embed = mlp((2 * context + 1) * code.dims, emb_dim)
            with torch.no_grad():
                embed.get_parameter("0.weight").div_(torch.tensor(code.usual).repeat(2 * context + 1))
            if code.begins_at_zero:
                zero_init(embed[-1])
            self.add_module(code.embedding, embed)
        motion_noise = self.config.extensions.motion.noise > 0
        self.noise_embed = mlp(self.config.network.model_channels, emb_dim) if motion_noise else None
        for code in self.codes:
            if (fitted := code.fitted(self.config)) is not None:
                self.add_module(code.name, fitted)

    @property
    def lip_predictor(self) -> LipPredictor | None:
        """What predicts the lip code from speech, where the network is given one."""
        found = self._modules.get(LipCode.name)
        return found if isinstance(found, LipPredictor) else None

    @property
    def head_motion(self) -> HeadMotion | None:
        """What moves the head by chance, where the network is given its pose."""
        found = self._modules.get(PoseCode.name)
        return found if isinstance(found, HeadMotion) else None

    def fitted(self, code: Code) -> nn.Module | None:
        """What was fitted to data for that code, if anything."""
        return self._modules.get(code.name)

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the weights of a network with fewer extensions; the rest begins as it is, at zero."""
        own = self.state_dict()
        for name, value in weights.items():
            if name not in own:
                continue
            if name in ("stem.weight", "detail.stem.weight"):  # further inputs begin without effect
                value = F.pad(value, (0, 0, 0, 0, 0, own[name].shape[1] - value.shape[1]))
            own[name] = value
        self.load_state_dict(own)

    def normalise(self, cues: Cues) -> Cues:
        """Cues with codes as measured -> cues with codes as the network takes them."""
        codes = {code.name: code.normalised(cues.codes[code.name], self.fitted(code)) for code in self.codes}
        return Cues(cues.audio_window, codes)

    def embed_time(self, t: Tensor, motion_noise: Tensor | None = None) -> Tensor:
        """As the paper's, with the noise level of the motion frames (B,) where the network is given it."""
        net = self.config.network
        time_emb = self.time_embed(timestep_embedding(t, net.model_channels, net.max_period))
        if self.noise_embed is not None and motion_noise is not None:
            # The level is scaled to the range of timesteps, so that the same cosines resolve it.
            level = timestep_embedding(1000 * motion_noise, net.model_channels, net.max_period)
            time_emb = time_emb + self.noise_embed(level)
        return F.silu(time_emb)

    def embed_audio(self, cues: Cues) -> Tensor:
        """As the paper's, with the codes."""
        audio_emb = self.audio_embed(cues.audio_window.flatten(1))
        for code in self.codes:
            if code.name in cues.codes:
                audio_emb = audio_emb + self.get_submodule(code.embedding)(cues.codes[code.name].flatten(1))
        return F.silu(audio_emb)

    def layers(self) -> list[Layer]:
        """In the order of computation."""
        detail = [layer for layer in self.detail.layers if isinstance(layer, Layer)] if self.detail else []
        return [*super().layers(), *detail]

    def stems(self) -> list[tuple[nn.Conv2d, int]]:
        """The convolutions that take the input, and the patch size of each."""
        patch = self.config.extensions.patches.size
        return [(self.stem, patch), *([(self.detail.stem, patch // 2)] if self.detail else [])]

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> ExtendedOutput:
        """x_t (B, 3, H, W), t (B,) original timesteps."""
        level = condition.motion_noise if isinstance(condition, MotionCondition) else None
        modulations = self.modulations(self.embed_time(t, level), self.embed_audio(condition.cues))
        x_in = self.input(x_t, condition)
        return self.denoise([stem(F.pixel_unshuffle(x_in, patch)) for stem, patch in self.stems()], modulations)

    def input(self, x_t: Tensor, condition: Condition) -> Tensor:
        """The paper's input with, at its end, the photo moved: (B, C, H, W)."""
        x_in = network_input(self.config, x_t, condition)
        photo = condition.photo if isinstance(condition, MotionCondition) else None
        return x_in if photo is None else torch.cat([x_in, photo.picture], 1)

    def denoise(self, stems: Sequence[Tensor], modulations: list[list[Tensor]]) -> ExtendedOutput:
        """From the output of each stem, (B, C, H', W') each, and each layer's scales and shifts."""
        patch = self.config.extensions.patches.size
        h = self.features(stems[0], modulations)
        out = F.pixel_shuffle(self.out_conv(h), patch)  # (B, 3 + 3 + 2, H, W)
        if self.detail is not None:
            fine = stems[1] + F.interpolate(self.detail.lift(h), scale_factor=2, mode="nearest")
            layers = self.detail.layers
            for layer, scales_and_shifts in zip(layers, modulations[-len(layers) :], strict=True):
                fine = self._run(layer, fine, *scales_and_shifts)
            fine = self.detail.out_conv(F.silu(self.detail.out_norm(fine)))
            out = F.pixel_shuffle(fine, patch // 2) + F.pad(out, (0, 0, 0, 0, 0, 1))  # (B, 3 + 3 + 2 + 1, H, W)
        prediction, var_frac, gates, *keep = out.split(self._splits, dim=1)
        return ExtendedOutput(
            prediction,
            var_frac if self._splits[1] else None,
            gates if self._splits[2] else None,
            keep[0] if keep else None,
            None if self.flow_head is None else self.flow_head(h),
        )

    def compose(
        self, schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor | int, output: Output, condition: Condition
    ) -> Tensor:
        """Pixels of the photo, then the detail of x_t."""
        assert isinstance(output, ExtendedOutput)
        if output.flow is not None and output.gates is not None:
            assert isinstance(condition, MotionCondition)
            assert condition.photo is not None
            taken = taken_from(condition.photo, output.gates, output.flow)
            x_0 = blended(x_0, condition.identity, sampled(condition.identity, taken.grid), taken.share)
        elif output.gates is not None:
            mask = mouth_mask(self.config.alignment, x_0.shape[-1], x_0.device)
            x_0 = blend_copies(x_0, output.gates.float(), condition, mask)
        if output.keep is not None:
            x_0 = keep_seen(schedule, x_0, x_t, t, output.keep.float())
        return x_0
