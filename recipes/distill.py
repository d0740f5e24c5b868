"""Distil weights to fewer steps: the student makes videos beside its teacher, and learns to draw each frame as it does.

    python recipes/distill.py --data data --out student.safetensors

Faces of the training split speak with the voices of others. From the same noise and motion frames the teacher draws a
frame in many steps and the student in few, with the solver that both sample by; what the student drew otherwise is its
loss, and goes back through all of its steps. Every other video goes on from the student's frame, the rest from the
teacher's, so that it learns from what it will be shown. (Regression along the student's own path, after Salimans and
Ho 2022 and DAgger, Ross et al. 2011.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from dheads.config import override
from dheads.dataset.dataset import Dataset
from dheads.denoiser import Denoiser
from dheads.diffusion import SOLVERS, Denoised, respaced
from dheads.extensions.motion import box_blur
from dheads.extensions.network import ExtendedUNet
from dheads.media.pixels import to_uint8, to_unit
from dheads.sampling.engine import Engine, Inputs
from dheads.sampling.lockstep import VideoSpec, in_lockstep
from dheads.system.devices import resolve_device
from dheads.training.augment import augment
from dheads.training.state import update_ema
from dheads.weights.checkpoints import build_model, load, save_checkpoint

WARMUP = 50  # steps of the optimiser
# In how many steps the student draws, by chance. What it was never asked for would come out far too sharp.
STEPS = (2, 2, 2, 2, 2, 2, 3, 4, 6, 12)
FRAMES = (20, 80)  # of a video, at least and at most


def main(
    data: Annotated[Path, typer.Option(help="Dataset made by `dheads prepare`.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
    weights: Annotated[str, typer.Option(help="The teacher.")] = "small",
    steps: Annotated[int, typer.Option(help="To sample the student by.")] = 3,
    teacher_steps: int = 12,
    batches: int = 1500,
    batch_size: int = 8,
    learning_rate: float = 2e-4,
    ema_decay: float = 0.99,
    device: str = "auto",
) -> None:
    """Distil weights to fewer steps."""
    torch.manual_seed(0)
    checkpoint = load(weights)
    unet = build_model(checkpoint, resolve_device(device))
    pair = Pair(unet, teacher_steps, batches, learning_rate, ema_decay)
    dataset = Dataset(data)
    made = override(checkpoint.config, {"sampling": {"steps": steps}})

    def save() -> None:
        info = {**checkpoint.info, "distilled": f"{pair.taught} batches of {batch_size}, from {weights}"}
        save_checkpoint(out, pair.ema.state_dict(), made, info, torch.float16)

    talks = videos(dataset, batch_size)
    with tqdm(total=batches, desc="distil", unit="batch") as bar:
        for number, _ in enumerate(in_lockstep(pair, talks, batch_size)):
            if number % batch_size:
                continue  # a batch's frames come one by one
            bar.update()
            bar.set_postfix_str(f"loss {pair.loss:.5f}")
            if pair.taught == batches:
                break
            if pair.taught % 200 == 0:
                save()
    save()
    typer.echo(out)


def videos(dataset: Dataset, group: int) -> Iterator[VideoSpec]:
    """Videos without end: an augmented picture of one training clip, and a part of the speech of another."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    clips = dataset.split("train")
    heard = [clip for clip in clips if clip.frames >= FRAMES[0]]
    seed = 0
    while True:
        seen = [clips[k] for k in rng.integers(len(clips), size=group)]
        pictures = np.stack([dataset.pictures(clip, [int(rng.integers(clip.frames))]) for clip in seen])
        frames, _ = augment(to_unit(pictures), torch.zeros(group, 1, 4), generator)  # (group, 1, 3, H, W)
        for photo in to_uint8(frames[:, 0]).numpy():
            speech = dataset.labels(heard[rng.integers(len(heard))])["speech"]
            count = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
            begin = int(rng.integers(max(1, len(speech) - count)))
            yield VideoSpec(photo, speech[begin : begin + count], seed)
            seed += 1


class Pair(Engine):
    """The teacher at work, and the student that learns from every frame drawn."""

    def __init__(
        self, unet: ExtendedUNet, teacher_steps: int, batches: int, learning_rate: float, ema_decay: float
    ) -> None:
        super().__init__(unet, replace(unet.config.sampling, steps=teacher_steps), compiled=True)
        self.student = copy.deepcopy(unet).requires_grad_(True)  # in eval mode: a copy of one function needs no dropout
        self.ema = copy.deepcopy(unet)
        self.taught = 0  # batches
        self.loss = float("nan")
        self._batches, self._learning_rate, self._ema_decay = batches, learning_rate, ema_decay
        self._optimizer = torch.optim.AdamW(self.student.parameters(), learning_rate, weight_decay=0)
        self.student.compile()
        self._denoiser = Denoiser(self.student, "bf16" if self.dtype == torch.bfloat16 else "fp32")
        self._chance = np.random.default_rng(1)

    def draw(self, inputs: Inputs, first: bool = True) -> Tensor:
        """The teacher's frames and the student's in turns (B, 3, H, W), after the student has learnt from them."""
        taught = super().draw(inputs, first)
        with torch.inference_mode(False), torch.enable_grad():  # what is made in inference mode has no gradient
            given = Inputs(*(None if value is None else value.clone() for value in vars(inputs).values()))
            own = self._learn(given, taught.clone())
        odd = torch.arange(len(own), device=own.device) % 2
        return torch.where(odd[:, None, None, None] == 1, own, taught)

    def _learn(self, inputs: Inputs, taught: Tensor) -> Tensor:
        left = 1 - self.taught / self._batches
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * min(1, 2 * left) * min(1, (self.taught + 1) / WARMUP)
        own, path = self.frame_of_student(inputs, int(self._chance.choice(STEPS)))
        early = torch.stack([unlikeness(x_0, taught, self._mask) for x_0 in path])
        loss = unlikeness(own, taught, self._mask) + 0.25 * early.mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self._optimizer.step()
        update_ema(self.ema, self.student, self.taught, self._ema_decay)
        self.taught, self.loss = self.taught + 1, loss.item()
        return own.detach()

    def frame_of_student(self, inputs: Inputs, steps: int) -> tuple[Tensor, list[Tensor]]:
        """The frame (B, 3, H, W), and what was seen of it before the last step, with their gradients."""
        condition, seen = self.condition(inputs), []
        schedule = respaced(self._denoiser.schedule, steps, self.sampling.spacing)

        def denoise(x_t: Tensor, t: int) -> Denoised:
            said, _ = self._denoiser(x_t, torch.full((len(x_t),), t, device=x_t.device), condition)
            seen.append(said.x_0)
            return said

        x_T, *added = inputs.noise.unbind(1)
        noise = iter(added)
        return SOLVERS[self.sampling.solver](denoise, schedule, x_T, lambda: next(noise)), seen[:-1]


def unlikeness(own: Tensor, taught: Tensor, mask: Tensor | None) -> Tensor:
    """The squared error, that of fine detail, and that of how much detail there is; around the mouth above all."""
    weight = 1 if mask is None else 1 + 2 * mask
    fine, wanted = detail(own), detail(taught)
    # A mean of what might be is blurred: its error is small, but it has too little detail.
    much = amount(fine) - amount(wanted)
    return (weight * ((own - taught).square() + 2 * (fine - wanted).square() + 4 * much.square())).mean()


def amount(fine: Tensor) -> Tensor:
    """How much detail there is around every pixel: its standard deviation within 9 px, (B, 3, H, W)."""
    # The small constant keeps the gradient finite where there is none.
    return (box_blur(fine.square(), 9) + 1e-5).sqrt()


def detail(frames: Tensor) -> Tensor:
    """What a blur of 3 px takes away, (B, 3, H, W)."""
    return frames - box_blur(frames, 3)


if __name__ == "__main__":
    typer.run(main)
