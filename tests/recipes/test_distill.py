"""The recipe that distils weights to fewer steps: the student's steps are the engine's, and it learns from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import program
from real_data import Prepared
from test_engine import inputs, lively

from dheads.config import preset
from dheads.sampling.engine import Engine
from dheads.weights.checkpoints import load_checkpoint, save_checkpoint

pytest_plugins = "real_data"

TINY = preset("tiny")


@pytest.fixture
def distill(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = program("recipes/distill.py")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # minutes
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _: None)
    return module


def test_the_student_draws_by_the_steps_of_the_engine(distill: ModuleType) -> None:
    torch.manual_seed(0)
    unet, given = lively(TINY), inputs(TINY, 2)
    pair = distill.Pair(unet, 6, 100, 1e-3, 0.9)
    own, path = pair.frame_of_student(given, 3)
    expected = Engine(unet, replace(TINY.sampling, steps=3), torch.float32).generate(given)
    assert len(path) == 2
    torch.testing.assert_close(own, expected, atol=0.02 if pair.dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_the_student_learns_what_the_teacher_draws(distill: ModuleType) -> None:
    torch.manual_seed(0)
    unet, given = lively(TINY), inputs(TINY, 2)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    pair = distill.Pair(unet, 6, 100, 3e-3, 0.9)
    losses = []
    for _ in range(40):
        drawn = pair.draw(given)
        losses.append(pair.loss)
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    taught = Engine.draw(pair, given)
    assert torch.equal(drawn[::2], taught[::2])  # every other video goes on from the student's frame
    assert not torch.equal(drawn[1::2], taught[1::2])


def test_a_sharp_guess_is_liked_better_than_a_blurred_mean(distill: ModuleType) -> None:
    flat = torch.zeros(1, 3, 32, 32)
    assert distill.unlikeness(flat, flat + 0.5, None).item() == pytest.approx(0.25)  # no detail in an even field
    taught, guess = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (guess - taught).square().mean() > 1.5 * taught.square().mean()
    assert distill.unlikeness(guess, taught, None) < distill.unlikeness(flat, taught, None)


def test_weights_become_a_student_that_says_so(distill: ModuleType, prepared: Prepared, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "teacher.safetensors", lively(TINY).state_dict(), TINY, {})
    out = tmp_path / "student.safetensors"
    distill.main(
        prepared.data,
        out,
        str(tmp_path / "teacher.safetensors"),
        steps=2,
        teacher_steps=3,
        batches=4,
        batch_size=2,
        device="cpu",
    )
    made = load_checkpoint(out)
    assert made.config.sampling.steps == 2
    assert made.info["distilled"].startswith("4 batches of 2, from ")
    assert all(value.isfinite().all() for value in made.tensors.values())
