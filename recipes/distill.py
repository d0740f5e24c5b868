"""Distil weights to fewer steps: the student generates videos together with its teacher, and learns from its frames.

    python recipes/distill.py --data data --out student.safetensors

The videos show faces of the training split with the speech of other clips. From the same noise and motion frames the
teacher generates a frame in many steps and the student in few, both with the sampling solver. The loss is the
difference of the two frames, and its gradient passes through all of the student's steps. Every other video continues
from the student's frame, the rest from the teacher's, so that the student is trained on motion frames of its own.
(Regression along the student's own path, after Salimans and Ho 2022 and DAgger, Ross et al. 2011.)

With --correct-lips the student also learns to open every mouth by as much as the lip code says (lip_correction.py):

    python recipes/distill.py --data data --out student.safetensors --steps 2 --teacher-steps 3 --correct-lips
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from lip_correction import LipCorrection, opening_direction
from torch import Tensor
from tqdm import tqdm

from dheads.config import Config, override
from dheads.dataset.dataset import Dataset
from dheads.denoiser import Denoiser
from dheads.diffusion import SOLVERS, Denoised, respaced
from dheads.errors import DheadsError
from dheads.extensions.copying import mouth_mask, uses_mouth_mask
from dheads.extensions.lips import LipCode
from dheads.extensions.motion import MotionCondition, box_blur
from dheads.extensions.network import ExtendedUNet
from dheads.extensions.pose import PoseCode, relative
from dheads.extensions.warp import resized
from dheads.media.pixels import to_uint8, to_unit
from dheads.sampling.engine import Engine, Inputs
from dheads.sampling.lockstep import VideoSpec, in_lockstep
from dheads.system.devices import COMPILE_OPTIONS, resolve_device
from dheads.training.augment import altered
from dheads.training.geometry import Geometry
from dheads.training.state import check_start, update_ema
from dheads.weights.checkpoints import build_model, load, save_checkpoint

WARMUP = 50  # steps of the optimiser
FRAMES = (20, 80)  # of a video, at least and at most
OPENING_WEIGHT = 0.2  # of the squared error of the mouth's opening, which is in eye distances


def main(
    data: Annotated[Path, typer.Option(help="Dataset made by `dheads prepare`.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
    weights: Annotated[str, typer.Option(help="The teacher: a name, or a checkpoint.")] = "small",
    steps: Annotated[int, typer.Option(help="Sampling steps a frame, stored in the checkpoint.")] = 3,
    teacher_steps: Annotated[int, typer.Option(help="The teacher's steps a frame.")] = 12,
    guidance: Annotated[float, typer.Option(help="By sound, of the teacher; the student has it for nothing.")] = 1.0,
    start: Annotated[str | None, typer.Option(help="The student's first weights; None: the teacher's.")] = None,
    batches: Annotated[int, typer.Option(help="Training steps, one a batch of frames, at most.")] = 1500,
    minutes: Annotated[float, typer.Option(help="Time after which training ends.")] = 1e9,
    batch_size: Annotated[int, typer.Option(help="Videos generated at once.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Largest learning rate.")] = 2e-4,
    ema_decay: Annotated[float, typer.Option(help="Decay of the average of the student's weights.")] = 0.99,
    correct_lips: Annotated[bool, typer.Option(help="Open every mouth by as much as the lip code says.")] = False,
    compiled: Annotated[bool, typer.Option(help="torch.compile both networks, which pays in long runs.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Distil weights to fewer steps."""
    torch.manual_seed(0)
    checkpoint, place = load(weights), resolve_device(device)
    has_lips = LipCode.name in checkpoint.config.extensions.codes
    if correct_lips and not has_lips:
        raise DheadsError(f"{weights}: has no lip code to correct; leave out --correct-lips")
    # Trial frames are not to be learnt, nor is the gain that they find for a face.
    as_told = {LipCode.name: {"gain": 1.0, "shown": 0.0}} if has_lips else {}
    config = override(checkpoint.config, {"sampling": {"steps": steps}})
    if correct_lips:
        config = override(config, {"extensions": {"codes": as_told}})
    teaching = {
        "sampling": {"steps": teacher_steps},
        "extensions": {"sound": {"guidance": guidance}, "codes": as_told},
    }
    first = checkpoint if start is None else load(start)
    check_start(checkpoint.config, first.config, start or weights)
    student, teacher = build_model(first, place), build_model(checkpoint, place)
    pair = Pair(
        teacher, override(config, teaching), student, steps, batches, learning_rate, ema_decay, compiled, minutes
    )
    dataset = Dataset(data)
    dataset.check(config, larger=True)
    if correct_lips:
        pair.correct_lips(dataset)

    def save() -> None:
        info = {**checkpoint.info, "distilled": f"{pair.updates} batches of {batch_size}, from {weights}"}
        save_checkpoint(out, pair.ema.state_dict(), config, info, torch.float16)

    with tqdm(total=batches, desc="distil", unit="batch") as bar:
        shown = videos(dataset, config.network.image_size, batch_size, config.extensions.warp.flow)
        for number, _ in enumerate(in_lockstep(pair, shown, batch_size)):
            if number % batch_size:
                continue  # the frames of a batch come one by one
            bar.update()
            bar.set_postfix_str(f"loss {pair.loss:.5f}")
            if pair.progress >= 1:
                break
            if pair.updates % 200 == 0:
                save()
    save()
    typer.echo(out)


def videos(dataset: Dataset, size: int, group: int, moves: bool) -> Iterator[VideoSpec]:
    """Endless videos of an augmented picture of one training clip with a part of the speech of another.

    size: of a side of the pictures, px. group: how many pictures are augmented at once. moves: whether heads move, as
    that of the other clip does.
    """
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    clips = dataset.split("train")
    speaking = [clip for clip in clips if clip.frames >= FRAMES[0]]
    seed = 0
    while True:
        shown = [clips[k] for k in rng.integers(len(clips), size=group)]
        frames = [int(rng.integers(clip.frames)) for clip in shown]
        pictures = np.stack([dataset.pictures(clip, [frame]) for clip, frame in zip(shown, frames, strict=True)])
        geometry = Geometry.random(group, dataset.size, generator)
        if moves:
            poses = [dataset.labels(clip)["pose"][frame] for clip, frame in zip(shown, frames, strict=True)]
            geometry = geometry.about(torch.stack(poses))
        varied = altered(geometry.pictures(to_unit(pictures)), generator)  # (group, 1, 3, H, W)
        for photo in to_uint8(resized(varied[:, 0], size)).numpy():
            labels = dataset.labels(speaking[rng.integers(len(speaking))])
            count = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
            begin = int(rng.integers(max(1, len(labels["speech"]) - count)))
            part = slice(begin, begin + count)
            codes = {PoseCode.name: relative(labels["pose"][part], labels["pose"][begin])} if moves else {}
            yield VideoSpec(photo, labels["speech"][part], seed, codes)
            seed += 1


class Pair(Engine):
    """The teacher's engine, which trains the student on every batch of frames that it generates."""

    def __init__(
        self,
        teacher: ExtendedUNet,
        config: Config,
        student: ExtendedUNet,
        steps: int,
        batches: int,
        learning_rate: float,
        ema_decay: float,
        compiled: bool = True,
        minutes: float = 1e9,
    ) -> None:
        """config: how the teacher samples. steps: of the student. batches, minutes: whichever ends first."""
        super().__init__(teacher, config, compiled=compiled)
        self.student = student.requires_grad_(True)  # in eval mode: imitation needs no dropout
        self.ema = copy.deepcopy(student).requires_grad_(False)
        self.updates = 0  # of the student's weights
        self.loss = float("nan")
        self._steps_mix = mixed_steps(steps)
        self._batches, self._learning_rate, self._ema_decay = batches, learning_rate, ema_decay
        self._optimizer = torch.optim.AdamW(self.student.parameters(), learning_rate, weight_decay=0)
        if compiled:
            self.student.compile(options=COMPILE_OPTIONS)
        self._denoiser = Denoiser(self.student, "bf16" if self.dtype == torch.bfloat16 else "fp32")
        self._rng = np.random.default_rng(1)
        self._start, self._minutes = time.monotonic(), minutes
        self._correction: LipCorrection | None = None
        self._mask = None
        if uses_mouth_mask(config):
            self._mask = mouth_mask(config.alignment, config.network.image_size, self.device)

    def correct_lips(self, dataset: Dataset) -> None:
        """From now on the student learns to open mouths by as much as the lip code says."""
        predictor = self.unet.lip_predictor
        assert predictor is not None
        self._correction = LipCorrection(self.config, predictor, opening_direction(dataset, predictor))

    @property
    def progress(self) -> float:
        """The part of the training that is done."""
        return max(self.updates / self._batches, (time.monotonic() - self._start) / 60 / self._minutes)

    def generate(self, inputs: Inputs, first: bool = True) -> Tensor:
        """The teacher's and the student's frames alternately (B, 3, H, W), after an update of the student."""
        target = self._target(inputs, first)
        with torch.inference_mode(False), torch.enable_grad():  # tensors of inference mode have no gradient
            own = self._update(inputs.map(torch.clone), target.clone())
        odd = torch.arange(len(own), device=own.device) % 2
        return torch.where(odd[:, None, None, None] == 1, own, target)

    @torch.inference_mode()
    def _target(self, inputs: Inputs, first: bool) -> Tensor:
        """The teacher's frame (B, 3, H, W). Where lips are corrected, its mouth is open as far as the code says."""
        if self._correction is not None:
            inputs = self._correction.inputs(inputs, lambda given: super(Pair, self).generate(given, first))
        return super().generate(inputs, first)

    def _update(self, inputs: Inputs, target: Tensor) -> Tensor:
        """Train the student on one batch of the teacher's frames (B, 3, H, W); returns the student's."""
        left = max(0.0, 1 - self.progress)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * min(1, 2 * left) * min(1, (self.updates + 1) / WARMUP)
        condition = self.condition(inputs)
        own, path = self.student_frame(condition, inputs.noise, int(self._rng.choice(self._steps_mix)))
        mask = self._mask if condition.photo is None else condition.photo.mask
        loss = frame_loss(own, target, mask)
        if path:
            loss = loss + 0.25 * torch.stack([frame_loss(x_0, target, mask) for x_0 in path]).mean()
        if self._correction is not None:
            error = self._correction.shown(own, inputs.cues) - self._correction.told(inputs.cues)
            loss = loss + OPENING_WEIGHT * error.square().mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self._optimizer.step()
        update_ema(self.ema, self.student, self.updates, self._ema_decay)
        self.updates, self.loss = self.updates + 1, loss.item()
        return own.detach()

    def student_frame(self, condition: MotionCondition, noise: Tensor, steps: int) -> tuple[Tensor, list[Tensor]]:
        """The student's frame (B, 3, H, W), and its predictions of x_0 before the last step, with gradients.

        noise (B, N, 3, H, W).
        """
        predictions: list[Tensor] = []
        schedule = respaced(self._denoiser.schedule, steps, self.sampling.spacing)

        def denoise(x_t: Tensor, t: int) -> Denoised:
            denoised, _ = self._denoiser(x_t, torch.full((len(x_t),), t, device=x_t.device), condition)
            predictions.append(denoised.x_0)
            return denoised

        x_T, *added = noise.unbind(1)
        fresh = iter(added)
        frame = SOLVERS[self.sampling.solver](denoise, schedule, x_T, lambda: next(fresh))
        return frame, predictions[:-1]


def mixed_steps(steps: int) -> tuple[int, ...]:
    """Numbers of steps to train; one is chosen at random for each batch.

    With a number that was not trained, frames come out far too sharp.
    """
    return (steps,) * 5 + (max(2, steps - 1),) * 2 + (steps + 1, 2 * steps)


def frame_loss(own: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Squared errors of the frame, of its fine detail and of the amount of detail, weighted more around the mouth.

    own, target (B, 3, H, W); mask (B or 1, 1, H, W) is 1 around the mouth, None: no extra weight. Returns a scalar.
    """
    weight = 1 if mask is None else 1 + 2 * mask
    own_detail, target_detail = detail(own), detail(target)
    # The mean of several possible frames is blurred: its error is small, but it has too little detail.
    lacking = detail_amount(own_detail) - detail_amount(target_detail)
    errors = (own - target).square() + 2 * (own_detail - target_detail).square() + 4 * lacking.square()
    return (weight * errors).mean()


def detail_amount(fine: Tensor) -> Tensor:
    """The standard deviation of fine detail in the 9 px square around every pixel, (B, 3, H, W)."""
    # The small constant keeps the gradient finite where there is no detail.
    return (box_blur(fine.square(), 9) + 1e-5).sqrt()


def detail(frames: Tensor) -> Tensor:
    """The fine detail of frames (B, 3, H, W): their difference from a 3 px blur."""
    return frames - box_blur(frames, 3)


if __name__ == "__main__":
    typer.run(main)
