"""Distil weights to fewer steps: the student learns to see at once, through the noise, what its teacher draws from it.

    python recipes/distill.py --data data --out student.safetensors --steps 3 --minutes 15

The teacher is the weights as they sample by default. For real motion frames and sound it draws a frame from noise x_T;
x_T and that frame x_0 are then joined by a straight path, on which the student is trained to tell x_0 (rectified flow,
Liu et al. 2023; InstaFlow, Liu et al. 2024), at the few noise levels that it will be asked at. The student keeps the
teacher's form and solver; its own `sampling` asks for so many steps.
"""

from __future__ import annotations

import copy
import time
from itertools import count
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from dheads.augment import drift
from dheads.config import override
from dheads.data import Dataset
from dheads.denoiser import Denoiser
from dheads.diffusion import eps_from_x_0, q_sample, respaced
from dheads.draws import Batch, Draws
from dheads.engine import Engine, Inputs
from dheads.losses import inside, snr_weight
from dheads.sample import resolve_device
from dheads.weights import build_model, load, save_checkpoint

WARMUP = 50  # steps of the optimiser


def main(
    data: Annotated[Path, typer.Option(help="Dataset made by `dheads prepare`.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
    weights: Annotated[str, typer.Option(help="The teacher.")] = "small",
    steps: Annotated[int, typer.Option(help="Of the student.")] = 3,
    minutes: float = 15,
    batch_size: int = 8,
    learning_rate: float = 2e-4,
    ema_decay: float = 0.98,
    device: str = "auto",
) -> None:
    """Distil weights to fewer steps."""
    torch.manual_seed(0)
    place = resolve_device(device)
    checkpoint = load(weights)
    teacher = Engine(build_model(checkpoint, place))
    student = copy.deepcopy(teacher.unet).requires_grad_(True)  # in eval mode: a copy of one function needs no dropout
    ema = copy.deepcopy(student).requires_grad_(False)
    config = override(checkpoint.config, {"training": {"batch_size": batch_size}})
    dataset = Dataset(data)
    draws = Draws(dataset, dataset.split("train"), config)
    denoiser = Denoiser(student, "bf16" if teacher.dtype == torch.bfloat16 else "fp32")
    grid = respaced(denoiser.schedule, steps, config.sampling.spacing).timestep_map.to(place)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], learning_rate, weight_decay=0)
    ends, bar = time.monotonic() + 60 * minutes, tqdm(desc="distil", unit="step")
    for step in count():
        done = 1 - (ends - time.monotonic()) / (60 * minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / WARMUP, 2 * (1 - done))
        loss = straight_loss(denoiser, teacher, draws.draw(step, 0), grid)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(ema.parameters(), student.parameters(), strict=True):
                kept.lerp_(new, 1 - ema_decay)
        bar.update()
        bar.set_postfix_str(f"loss {loss.item():.5f}")
    made = override(checkpoint.config, {"sampling": {"steps": steps}})
    info = {**checkpoint.info, "distilled": f"{step} batches of {batch_size}, from {weights}"}
    save_checkpoint(out, ema.state_dict(), made, info, torch.float16)
    typer.echo(out)


def straight_loss(denoiser: Denoiser, teacher: Engine, batch: Batch, grid: Tensor) -> Tensor:
    """How far from the teacher's x_0 the student's is, on the straight path from x_T, at the timesteps of `grid`."""
    inputs = inputs_of(teacher, batch)
    schedule, last = denoiser.schedule, denoiser.schedule.num_steps - 1
    x_0 = teacher.draw(inputs).clone()  # (B, 3, H, W)
    eps = eps_from_x_0(schedule, inputs.noise[:, 0], last, x_0)
    t = grid[torch.randint(len(grid), (len(x_0),), device=grid.device)]
    x_t = q_sample(schedule, x_0, t, eps)
    seen = denoiser(x_t, t, teacher.condition(inputs))[0].x_0
    weight = snr_weight(schedule, t, 5.0)[:, None, None, None]
    error = weight * (seen - x_0).square()
    return error.mean() + 0.2 * inside(error, batch.mouth_box).mean()


def inputs_of(teacher: Engine, batch: Batch) -> Inputs:
    """What a frame of each example is made from; motion frames are spoilt as those of a long video are."""
    device, unet = teacher.device, teacher.unet
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    motion_frames = drift(batch.motion_frames, 0.5, generator).to(device)
    lips = None if unet.lips is None else unet.lips.normalise(batch.lip_window.to(device))
    return Inputs(
        batch.identity.to(device),
        motion_frames,
        batch.audio_window.to(device),
        lips,
        torch.randn_like(motion_frames) if teacher.config.conditioning.motion_noise else None,
        torch.randn(len(motion_frames), teacher.draws, *batch.identity.shape[1:], device=device),
        batch.eye_window.to(device) if teacher.config.conditioning.eye_dims else None,
    )


if __name__ == "__main__":
    typer.run(main)
