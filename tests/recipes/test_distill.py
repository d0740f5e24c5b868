"""The recipe that distils weights to fewer steps."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import program
from real_data import Prepared
from test_engine import PAPER, WARP, inputs, lively

from dheads.config import Config, override, preset
from dheads.errors import DheadsError
from dheads.extensions.network import ExtendedUNet
from dheads.sampling.engine import Engine
from dheads.weights.checkpoints import Checkpoint, load_checkpoint, save_checkpoint

pytest_plugins = "real_data"

TINY = preset("tiny")


@pytest.fixture
def distill(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = program("recipes/distill.py")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes minutes
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _, **__: None)
    return module


def pair_of(distill: ModuleType, unet: ExtendedUNet, learning_rate: float, guidance: float = 1.0) -> Engine:
    """A teacher of six steps, and a student of three with the same weights."""
    config = override(TINY, {"sampling": {"steps": 6}, "extensions": {"sound": {"guidance": guidance}}})
    return distill.Pair(unet, config, copy.deepcopy(unet), 3, 100, learning_rate, 0.9)


def test_the_student_generates_frames_as_the_engine_does(distill: ModuleType) -> None:
    torch.manual_seed(0)
    unet, given = lively(TINY), inputs(TINY, 2)
    pair = pair_of(distill, unet, 1e-3)
    own, path = pair.student_frame(pair.condition(given), given.noise, 3)
    expected = Engine(unet, override(TINY, {"sampling": {"steps": 3}}), torch.float32).generate(given)
    assert len(path) == 2
    torch.testing.assert_close(own, expected, atol=0.02 if pair.dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_the_student_learns_the_frames_of_the_teacher(distill: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "WARMUP", 5)
    torch.manual_seed(0)
    unet, given = lively(TINY), inputs(TINY, 2)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    pair = pair_of(distill, unet, 3e-3)
    losses = []
    for _ in range(24):
        frames = pair.generate(given)
        losses.append(pair.loss)
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    target = Engine.generate(pair, given)
    assert torch.equal(frames[::2], target[::2])  # every other video continues from the student's frame
    assert not torch.equal(frames[1::2], target[1::2])


def test_the_teacher_may_be_guided(distill: ModuleType) -> None:
    torch.manual_seed(0)
    unet, given = lively(TINY), inputs(TINY, 2)
    plain, guided = (Engine.generate(pair_of(distill, unet, 1e-3, guidance), given) for guidance in (1.0, 2.0))
    expected = Engine(unet, override(TINY, {"sampling": {"steps": 6}, "extensions": {"sound": {"guidance": 2.0}}}))
    assert torch.equal(guided, expected.generate(given))
    assert not torch.equal(guided, plain)


def test_a_student_may_take_a_single_step(distill: ModuleType) -> None:
    torch.manual_seed(0)
    unet, given = lively(TINY), inputs(TINY, 2)
    pair = distill.Pair(unet, TINY, copy.deepcopy(unet), 1, 100, 1e-3, 0.9)
    losses = []
    for _ in range(6):
        pair.generate(given)
        losses.append(pair.loss)
    assert 1 in distill.mixed_steps(1)
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)


def test_a_start_of_another_network_is_refused(distill: ModuleType, tmp_path: Path) -> None:
    for name, config in (("teacher", TINY), ("start", WARP)):
        save_checkpoint(tmp_path / f"{name}.safetensors", lively(config).state_dict(), config, {})
    files = [str(tmp_path / f"{name}.safetensors") for name in ("teacher", "start")]
    with pytest.raises(DheadsError, match=r"start.safetensors: was trained with network"):
        distill.main(tmp_path, tmp_path / "out.safetensors", files[0], start=files[1], device="cpu")


def test_a_sharp_guess_has_a_lower_loss_than_a_blurred_mean(distill: ModuleType) -> None:
    flat = torch.zeros(1, 3, 32, 32)
    assert distill.frame_loss(flat, flat + 0.5, None).item() == pytest.approx(0.25)  # a flat picture has no detail
    target, guess = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (guess - target).square().mean() > 1.5 * target.square().mean()
    assert distill.frame_loss(guess, target, None) < distill.frame_loss(flat, target, None)


def distilled(
    distill: ModuleType, prepared: Prepared, folder: Path, config: Config, **options: int | bool
) -> Checkpoint:
    """The student of two steps of a lively teacher, trained on batches of two."""
    teacher, student = folder / "teacher.safetensors", folder / "student.safetensors"
    save_checkpoint(teacher, lively(config).state_dict(), config, {})
    distill.main(prepared.data, student, str(teacher), steps=2, batch_size=2, device="cpu", **options)
    return load_checkpoint(student)


@pytest.mark.parametrize("config", [TINY, WARP], ids=["tiny", "warp"])
def test_the_checkpoint_records_the_distillation(
    distill: ModuleType, prepared: Prepared, tmp_path: Path, config: Config
) -> None:
    student = distilled(distill, prepared, tmp_path, config, teacher_steps=3, batches=4)
    assert student.config.sampling.steps == 2
    assert student.info["distilled"].startswith("4 batches of 2, from ")
    assert all(value.isfinite().all() for value in student.tensors.values())


def test_lips_may_be_corrected(distill: ModuleType, prepared: Prepared, tmp_path: Path) -> None:
    """The student opens mouths as far as the lip code says, so its configuration asks for no gain."""
    lips = {"shown": 0.7, "gain": 1.3}
    config = override(WARP, {"extensions": {"codes": {"lips": lips}}})
    student = distilled(distill, prepared, tmp_path, config, teacher_steps=2, batches=2, correct_lips=True)
    table = student.config.extensions.codes["lips"]
    assert (table.gain, table.shown) == (1.0, 0.0), "a face needs no gain of its own any more"
    assert all(value.isfinite().all() for value in student.tensors.values())


def test_lips_are_corrected_only_where_there_is_a_code(distill: ModuleType, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "teacher.safetensors", lively(PAPER).state_dict(), PAPER, {})
    with pytest.raises(DheadsError, match=r"teacher.safetensors: has no lip code to correct; leave out --correct-lips"):
        distill.main(tmp_path, tmp_path / "out", str(tmp_path / "teacher.safetensors"), correct_lips=True, device="cpu")


def test_training_ends_with_the_time(distill: ModuleType) -> None:
    torch.manual_seed(0)
    unet = lively(TINY)
    pair = distill.Pair(unet, TINY, copy.deepcopy(unet), 2, 1000, 1e-3, 0.9, minutes=1e-9)
    assert pair.progress >= 1
