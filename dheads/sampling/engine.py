"""Runs a network for sampling: its device, precision, memory format, compilation and buffers.

Of one video's conditioning the time never changes; the audio and the pictures besides x_t change once a frame. So every
block's scale and shift by time are computed once, those by audio once a frame, and so is the first convolution of the
motion frames and the identity. What is left for every step is the network on x_t. Nothing inside a frame waits for the
device, so that on CUDA all its steps are one graph, recorded once and replayed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dheads.conditioning import Condition, build, mouth_mask_for, network_input
from dheads.config import SamplingConfig
from dheads.denoiser import denoised, training_schedule
from dheads.diffusion import SOLVERS, Denoise, Denoised, q_sample, respaced, shortened
from dheads.model import UNet, modulation
from dheads.system.devices import COMPILE_OPTIONS, best_dtype


@dataclass(frozen=True, eq=False)
class Inputs:
    """What one frame of B videos is made from, noise and all."""

    identity: Tensor  # (B, 3, H, W)
    motion_frames: Tensor  # (B, M, 3, H, W), clean, oldest first
    audio_window: Tensor  # (B, A, D)
    lip_window: Tensor | None  # (B, A', L)
    motion_eps: Tensor | None  # (B, M, 3, H, W) standard normal, for models that are told of noise on motion frames
    noise: Tensor  # (B, N, 3, H, W) standard normal: x_T, then what the solver adds at each step
    eye_window: Tensor | None = None  # (B, A'', 1)


class Engine:
    """A network at work as `sampling` says; x_t and the solver's arithmetic stay float32."""

    def __init__(
        self,
        unet: UNet,
        sampling: SamplingConfig | None = None,
        dtype: torch.dtype | None = None,
        compiled: bool = False,
        recorded: bool = True,
    ) -> None:
        """sampling: by default the weights' own. dtype: what convolutions and attention compute in; None: what is
        fastest on the network's device. compiled: torch.compile first, which pays in long work only. recorded: on CUDA
        frames become graphs, which pays where batches of one size are many."""
        self.unet, self.config = unet, unet.config
        self.sampling = sampling or unet.config.sampling
        self.device = next(unet.parameters()).device
        self.dtype = dtype or best_dtype(self.device)
        self.records = recorded and self.device.type == "cuda"  # frames as CUDA graphs, one for each batch size
        self._full = training_schedule(self.config.diffusion)
        self.schedule = respaced(self._full, self.sampling.steps, self.sampling.spacing)
        self._steps = {int(t): step for step, t in enumerate(self.schedule.timestep_map)}
        # Embeddings, scales and shifts are a trifle to compute: they stay float32.
        self._network = copy.deepcopy(unet).eval().to(self.dtype, memory_format=torch.channels_last)
        self._stems = self._network.stems()
        self._denoise = self._network.denoise
        if compiled:
            self._denoise = torch.compile(self._denoise, dynamic=False, options=COMPILE_OPTIONS)
        self._blocks = [[(b.time_affine, b.audio_affine) for b in layer.blocks()] for layer in unet.layers()]
        with torch.no_grad():
            self._mask = mouth_mask_for(
                self.config, torch.empty(3, *[self.config.model.image_size] * 2, device=self.device)
            )
            self._times = self._time_affines()
        # By pixel, (1, 1, 1, H, W), or one number.
        mouth = torch.ones(1, device=self.device) if self._mask is None else self._mask[None]
        outer = self.sampling.outer_shared_noise
        self._shared_noise = outer + (self.sampling.shared_noise - outer) * mouth
        self._temperature = self.sampling.outer_temperature + (1 - self.sampling.outer_temperature) * mouth  # of x_T
        self._graphs: dict[tuple[int, bool], _Graph] = {}

    @torch.no_grad()
    def renew(self) -> None:
        """Take the network's weights as they are now, as after a step of training."""
        torch._foreach_copy_(list(self._network.state_dict().values()), list(self.unet.state_dict().values()))
        for layer, renewed in zip(self._times, self._time_affines(), strict=True):
            torch._foreach_copy_(layer, renewed)  # in place, where recorded frames look for them

    @property
    def draws(self) -> int:
        """How much noise a frame takes: x_T, and what the solver adds."""
        return self.sampling.steps if self.sampling.solver == "ddpm" else 1

    @property
    def warms(self) -> bool:
        """Whether frames after the first start from the last one."""
        return 0 < self.sampling.warm_steps < self.sampling.steps and self.config.conditioning.motion_frames > 0

    def frame_noise(self, fresh: Tensor, last: Tensor | None, pause: float = 0.0) -> tuple[Tensor, Tensor]:
        """What a frame is drawn from, of standard normal noise (B, N, 3, H, W), and what to hand on as `last`.

        last: (B, 1, 3, H, W), what the frame before it handed on, from which it has a share of its x_T. pause: how far
        it is one, 0 .. 1.
        """
        x_T = fresh[:, :1]
        if last is not None:
            share = self._shared_noise.clamp(min=self.sampling.pause_shared_noise * pause)
            # x_T = sqrt(s) x_T^(k-1) + sqrt(1 - s) eps: nothing stays for good, so nothing piles up
            x_T = share.sqrt() * last + (1 - share).sqrt() * x_T
        return torch.cat([self._temperature * x_T, fresh[:, 1:]], dim=1), x_T

    @torch.inference_mode()
    def draw(self, inputs: Inputs, first: bool = True) -> Tensor:
        """x_0 (B, 3, H, W) in [-1, 1] of the next frame of B videos. On CUDA the work is only begun on return.

        first: whether these are the videos' first frames.
        """
        warm = self.warms and not first
        if not self.records:
            return self._draw(inputs, warm)
        key = (len(inputs.identity), warm)
        if key not in self._graphs:
            self._graphs[key] = _Graph(lambda given: self._draw(given, warm))
        return self._graphs[key](inputs)

    def _draw(self, inputs: Inputs, warm: bool) -> Tensor:
        schedule, (x_T, *added) = self.schedule, inputs.noise.unbind(1)
        if warm:
            schedule = shortened(schedule, self.sampling.warm_steps)
            x_T = q_sample(schedule, inputs.motion_frames[:, -1], schedule.num_steps - 1, x_T)
        denoise, noise = self._guided(self.condition(inputs)), iter(added)
        return SOLVERS[self.sampling.solver](denoise, schedule, x_T, lambda: next(noise)).clamp(-1, 1)

    def condition(self, inputs: Inputs) -> Condition:
        """What the network is told of a frame."""
        level = None
        if self.config.conditioning.motion_noise:
            level = inputs.identity.new_full((len(inputs.identity),), self.sampling.motion_noise)
        return build(
            self.config,
            inputs.identity,
            inputs.motion_frames,
            inputs.audio_window,
            inputs.lip_window,
            level,
            inputs.motion_eps,
            self._mask,
            inputs.eye_window,
        )

    def _guided(self, condition: Condition) -> Denoise:
        """Classifier-free guidance by the sound (Ho & Salimans 2022)."""
        guidance = self.sampling.guidance
        if guidance == 1:
            return self.frame(condition)
        denoise = self.frame(condition.joined(condition.without_audio()))

        def guided(x_t: Tensor, t: int) -> Denoised:
            both = denoise(torch.cat([x_t, x_t]), t)
            hearing, deaf = both.x_0.chunk(2)
            var_frac = None if both.var_frac is None else both.var_frac.chunk(2)[0]
            # x_0 = x_0(deaf) + g (x_0(hearing) - x_0(deaf))
            return Denoised(torch.lerp(deaf, hearing, guidance), var_frac)

        return guided

    def frame(self, condition: Condition) -> Denoise:
        """What a solver asks for one frame of B videos, with everything computed that is the same at every step."""
        # The stems are linear: what they make of x_t is added at every step.
        others = network_input(self.config, torch.zeros_like(condition.identity), condition)
        still = [stem(self._patches(others, patch)) for stem, patch in self._stems]
        kernels = [stem.weight[:, : 3 * patch**2] for stem, patch in self._stems]
        audio_emb = self.unet.embed_audio(condition)
        modulations = [  # (steps, B, C) each
            [
                part.to(self.dtype)
                for t, (_, affine) in zip(times, affines, strict=True)
                for part in modulation(t[:, None], affine(audio_emb))
            ]
            for times, affines in zip(self._times, self._blocks, strict=True)
        ]

        def denoise(x_t: Tensor, t: int) -> Denoised:
            stems = [
                F.conv2d(self._patches(x_t, patch), kernel, padding=1) + constant
                for (_, patch), kernel, constant in zip(self._stems, kernels, still, strict=True)
            ]
            step = self._steps[t]
            output = self._denoise(stems, [[part[step] for part in layer] for layer in modulations])
            return denoised(self.config, self._full, x_t, t, output, condition)

        return denoise

    def _patches(self, picture: Tensor, patch: int) -> Tensor:
        return F.pixel_unshuffle(picture, patch).to(self.dtype, memory_format=torch.channels_last)

    def _time_affines(self) -> list[list[Tensor]]:
        """By layer and block: what each step says, (steps, 2C)."""
        t = self.schedule.timestep_map.to(self.device)
        told = self.config.conditioning.motion_noise > 0
        level = torch.full(t.shape, self.sampling.motion_noise, device=self.device) if told else None
        time_emb = self.unet.embed_time(t, level)  # (steps, E)
        return [[affine(time_emb) for affine, _ in layer] for layer in self._blocks]


class _Graph:
    """Work on inputs of one shape as a CUDA graph. The first call does it in the ordinary way, which warms it up."""

    def __init__(self, work: Callable[[Inputs], Tensor]) -> None:
        self._work = work
        self._warmed = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Inputs) -> Tensor:
        if not self._warmed:
            self._warmed = True
            return self._work(inputs)
        if self._graph is None:
            self._inputs = Inputs(*(value if value is None else value.clone() for value in _values(inputs)))
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device, as the loader of a training run does.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._output = self._work(self._inputs)
        for kept, value in zip(_values(self._inputs), _values(inputs), strict=True):
            if kept is not None:
                kept.copy_(value)
        self._graph.replay()
        return self._output.clone()


def _values(inputs: Inputs) -> list[Tensor | None]:
    return [getattr(inputs, field.name) for field in dataclasses.fields(inputs)]
