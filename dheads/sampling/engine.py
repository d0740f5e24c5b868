"""Runs a network for sampling: its device, precision, memory format, compilation and buffers.

In one video the timesteps never change; the audio and the other pictures change once a frame. So every block's scale
and shift by time are computed once, those by audio once a frame, and so is the first convolution of the motion frames
and the identity. What is left for every step is the network on x_t. Nothing inside a frame waits for the device, so
that on CUDA all its steps are one graph, recorded once and replayed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dheads.conditioning import Cues
from dheads.config import Config
from dheads.denoiser import denoised, training_schedule
from dheads.diffusion import SOLVERS, Denoise, Denoised, q_sample, respaced, shortened
from dheads.extensions.guidance import guided, with_and_without_sound
from dheads.extensions.motion import MotionCondition, condition_with
from dheads.extensions.network import ExtendedOutput, ExtendedUNet
from dheads.extensions.noise import NoiseSharing
from dheads.extensions.warp import Taken, taken_from
from dheads.model import modulation
from dheads.system.devices import COMPILE_OPTIONS, best_dtype


@dataclass(frozen=True, eq=False)
class Inputs:
    """What one frame of B videos is generated from, noise included."""

    identity: Tensor  # (B, 3, H, W)
    motion_frames: Tensor  # (B, M, 3, H, W), clean, oldest first
    cues: Cues
    motion_eps: Tensor | None  # (B, M, 3, H, W) standard normal, for networks that are given noise on motion frames
    noise: Tensor  # (B, N, 3, H, W) standard normal: x_T, then what the solver adds at each step

    def tensors(self) -> list[Tensor]:
        """All of them, in one order."""
        motion_eps = [] if self.motion_eps is None else [self.motion_eps]
        cues = [self.cues.audio_window, *self.cues.codes.values()]
        return [self.identity, self.motion_frames, *cues, *motion_eps, self.noise]

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with every tensor changed alike."""
        motion_eps = None if self.motion_eps is None else change(self.motion_eps)
        identity, motion_frames = change(self.identity), change(self.motion_frames)
        return Inputs(identity, motion_frames, self.cues.map(change), motion_eps, change(self.noise))

    @staticmethod
    def cat(several: list[Inputs]) -> Inputs:
        """Several batches as one."""
        motion_eps = [one.motion_eps for one in several if one.motion_eps is not None]
        return Inputs(
            torch.cat([one.identity for one in several]),
            torch.cat([one.motion_frames for one in several]),
            Cues.cat([one.cues for one in several]),
            torch.cat(motion_eps) if motion_eps else None,
            torch.cat([one.noise for one in several]),
        )


@dataclass(frozen=True, eq=False)
class Made:
    """Frames of B videos, and what they take from their photos where these are moved."""

    x_0: Tensor  # (B, 3, H, W)
    taken: Taken | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Made:
        """The same with every tensor changed alike."""
        return Made(change(self.x_0), None if self.taken is None else self.taken.map(change))


class Engine:
    """Generates frames with one network and one way of sampling; x_t and the solver's arithmetic stay float32."""

    def __init__(
        self,
        unet: ExtendedUNet,
        config: Config | None = None,
        dtype: torch.dtype | None = None,
        compiled: bool = False,
        recorded: bool = True,
    ) -> None:
        """config: by default the network's own; its sections sampling and extensions may say otherwise how frames are
        sampled. dtype: of convolutions and attention; None: what is fastest on the network's device. compiled:
        torch.compile first, which pays in long work only. recorded: on CUDA frames become graphs, which pays where
        many batches have one size."""
        self.unet, self.config = unet, config or unet.config
        self.sampling, self.extensions = self.config.sampling, self.config.extensions
        self.device = next(unet.parameters()).device
        self.dtype = dtype or best_dtype(self.device)
        self.records = recorded and self.device.type == "cuda"  # frames as CUDA graphs, one for each batch size
        self._full = training_schedule(self.config.diffusion)
        self.schedule = respaced(self._full, self.sampling.steps, self.sampling.spacing)
        self._steps = {int(t): step for step, t in enumerate(self.schedule.timestep_map)}
        # Embeddings, scales and shifts cost little: they stay float32.
        self._network = copy.deepcopy(unet).eval().to(self.dtype)
        self._network.to(memory_format=torch.channels_last)
        self.mouth = self._network.mouth
        self._stems = self._network.stems()
        self._denoise = self._network.denoise
        if compiled:
            self._denoise = torch.compile(self._denoise, dynamic=False, options=COMPILE_OPTIONS)
        self._blocks = [[(b.time_affine, b.audio_affine) for b in layer.blocks()] for layer in unet.layers()]
        with torch.no_grad():
            self._times = self._time_affines()
        self.frame_noise = NoiseSharing(self.config, self.device)
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        self._output: ExtendedOutput  # of the network's last call
        self.taken: Taken | None = None  # by the frames generated last, from their photos

    @torch.no_grad()
    def renew(self) -> None:
        """Take the network's weights as they are now, as after a step of training."""
        torch._foreach_copy_(list(self._network.state_dict().values()), list(self.unet.state_dict().values()))
        for layer, renewed in zip(self._times, self._time_affines(), strict=True):
            torch._foreach_copy_(layer, renewed)  # in place, where recorded frames look for them

    @property
    def noises(self) -> int:
        """Standard normal pictures that a frame takes, N: x_T, and what the solver adds."""
        return self.sampling.steps if self.sampling.solver == "ddpm" else 1

    @property
    def warms(self) -> bool:
        """Whether frames after the first start from the last one."""
        return 0 < self.extensions.noise.warm_steps < self.sampling.steps and self.config.conditioning.motion_frames > 0

    @torch.inference_mode()
    def generate(self, inputs: Inputs, first: bool = True) -> Tensor:
        """x_0 (B, 3, H, W) in [-1, 1] of the next frame of B videos. On CUDA the work is only begun on return.

        first: whether these are the videos' first frames.
        """
        warm = self.warms and not first
        if self.records:
            key = (len(inputs.identity), warm)
            if key not in self._graphs:
                self._graphs[key] = _Graph(lambda given: self._generate(given, warm))
            made = self._graphs[key](inputs)
        else:
            made = self._generate(inputs, warm)
        self.taken = made.taken
        return made.x_0

    def _generate(self, inputs: Inputs, warm: bool) -> Made:
        schedule, (x_T, *added) = self.schedule, inputs.noise.unbind(1)
        if warm:
            schedule = shortened(schedule, self.extensions.noise.warm_steps)
            x_T = q_sample(schedule, inputs.motion_frames[:, -1], schedule.num_steps - 1, x_T)
        condition, noise = self.condition(inputs), iter(added)
        x_0 = SOLVERS[self.sampling.solver](self._conditioned(condition), schedule, x_T, lambda: next(noise))
        return Made(x_0.clamp(-1, 1), self._taken_in(condition))

    def _taken_in(self, condition: MotionCondition) -> Taken | None:
        """What the last step took from the photos."""
        flow, gates, count = self._output.flow, self._output.gates, len(condition.identity)
        if condition.photo is None or flow is None or gates is None:
            return None
        # With guidance the first half of the batch is the one that hears.
        return taken_from(condition.photo, gates[:count], flow[:count])

    def condition(self, inputs: Inputs) -> MotionCondition:
        """What the network is given of a frame."""
        motion, level = self.extensions.motion, None
        if motion.noise:
            level = inputs.identity.new_full((len(inputs.identity),), motion.sampling_noise)
        frames, favour = inputs.motion_frames, self.extensions.warp.favour
        return condition_with(self.config, inputs.identity, frames, inputs.cues, level, inputs.motion_eps, favour)

    def _conditioned(self, condition: MotionCondition) -> Denoise:
        guidance = self.extensions.sound.guidance
        if guidance == 1:
            return self.frame(condition)
        return guided(self.frame(with_and_without_sound(condition)), guidance)

    def frame(self, condition: MotionCondition) -> Denoise:
        """What a solver calls for one frame of B videos; everything that is the same at every step is computed here."""
        # The stems are linear: their output for x_t is added at every step.
        others = self.unet.input(torch.zeros_like(condition.identity), condition)
        still = [stem(self._patches(others, patch)) for stem, patch in self._stems]
        kernels = [stem.weight[:, : 3 * patch**2] for stem, patch in self._stems]
        audio_emb = self.unet.embed_audio(condition.cues)
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
            self._output = self._denoise(stems, [[part[step] for part in layer] for layer in modulations])
            return denoised(self.unet, self._full, x_t, t, self._output, condition)

        return denoise

    def _patches(self, picture: Tensor, patch: int) -> Tensor:
        return F.pixel_unshuffle(picture, patch).to(self.dtype, memory_format=torch.channels_last)

    def _time_affines(self) -> list[list[Tensor]]:
        """By layer and block: the projections of every step's time embedding, (steps, 2C)."""
        t = self.schedule.timestep_map.to(self.device)
        motion = self.extensions.motion
        level = torch.full(t.shape, motion.sampling_noise, device=self.device) if motion.noise > 0 else None
        time_emb = self.unet.embed_time(t, level)  # (steps, E)
        return [[affine(time_emb) for affine, _ in layer] for layer in self._blocks]


class _Graph:
    """Work on inputs of one shape as a CUDA graph. The first call does it in the ordinary way, which warms it up."""

    def __init__(self, work: Callable[[Inputs], Made]) -> None:
        self._work = work
        self._warmed = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Inputs) -> Made:
        if not self._warmed:
            self._warmed = True
            return self._work(inputs)
        if self._graph is None:
            self._inputs = inputs.map(torch.clone)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device, as the loader of a training run does.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._made = self._work(self._inputs)
        for kept, value in zip(self._inputs.tensors(), inputs.tensors(), strict=True):
            kept.copy_(value)
        self._graph.replay()
        return self._made.map(torch.clone)
