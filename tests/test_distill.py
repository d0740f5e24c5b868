"""The recipe that distils weights to fewer steps: what the student is taught, and that it learns it."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from test_engine import lively

from dheads.config import Config, preset
from dheads.denoiser import Denoiser
from dheads.diffusion import eps_from_x_0, q_sample
from dheads.draws import Batch
from dheads.engine import Engine

TINY = preset("tiny")


@pytest.fixture(scope="module")
def distill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distill", ROOT / "recipes" / "distill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch(config: Config, count: int) -> Batch:
    size, told = config.model.image_size, config.conditioning
    pictures = torch.rand(count, 2 + told.motion_frames, 3, size, size) * 2 - 1
    return Batch(
        pictures[:, 0],
        pictures[:, 1],
        pictures[:, 2:],
        torch.randn(count, 2 * told.audio_context + 1, told.speech_dim),
        torch.randn(count, 2 * told.lip_context + 1, 3),
        torch.tensor([[8, 16, 24, 28]] * count),
        torch.rand(count, 2 * told.eye_context + 1, 1) - 1,
        torch.tensor([[6, 8, 26, 16]] * count),
        ["clip"] * count,
    )


def test_the_path_is_straight_from_the_noise_to_the_teachers_frame() -> None:
    schedule = Denoiser(lively(TINY)).schedule
    x_0, x_T = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    eps = eps_from_x_0(schedule, x_T, 999, x_0)
    torch.testing.assert_close(q_sample(schedule, x_0, 999, eps), x_T)


def test_the_student_learns_what_the_teacher_draws(distill: ModuleType) -> None:
    teacher = Engine(lively(TINY), dtype=torch.float32)
    student = lively(TINY).requires_grad_(True)
    denoiser, examples = Denoiser(student), batch(TINY, 4)
    grid = torch.tensor([0, 250, 999])
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    before = {name: value.clone() for name, value in teacher.unet.state_dict().items()}
    losses = []
    for _ in range(30):
        torch.manual_seed(1)  # the same noise and timesteps each time
        loss = distill.straight_loss(denoiser, teacher, examples, grid)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.unet.state_dict().items())
