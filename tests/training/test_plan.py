"""The cost of a configuration, compared with the paper's figures and with networks that really run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dheads.conditioning import Cues
from dheads.config import override, preset
from dheads.extensions.motion import MotionCondition
from dheads.extensions.network import ExtendedUNet
from dheads.training.plan import Plan, plan


def tiny(clips: int | None = 10, processes: int = 1, **sections: dict[str, object]) -> Plan:
    return plan(override(preset("tiny"), sections), clips, processes)


@pytest.fixture(scope="module")
def crema() -> Plan:
    return plan(preset("crema"), clips=6_622, processes=8)


def test_the_papers_network(crema: Plan) -> None:
    assert crema.parameters == pytest.approx(204e6, rel=0.01)
    assert crema.forward_flops == pytest.approx(0.997e12, rel=0.01)
    # Weights, gradients, two moments, EMA; four bytes each.
    assert crema.state_bytes == 5 * 4 * crema.parameters
    assert 15 * 2**30 < crema.activation_bytes < 25 * 2**30
    assert crema.memory_bytes == crema.state_bytes + crema.activation_bytes


def test_the_papers_training_runs(crema: Plan) -> None:
    assert crema.effective_batch == 80
    assert crema.steps_per_epoch == pytest.approx(6_622 / 80)
    assert crema.epochs == pytest.approx(3_000, rel=0.01)
    assert crema.step_flops == 3 * 80 * crema.forward_flops
    lrw = plan(preset("lrw"), clips=488_766, processes=8)
    assert lrw.epochs == pytest.approx(112, rel=0.01)
    assert lrw.forward_flops < crema.forward_flops  # fewer input channels


def test_batches_add_up_over_processes_and_turns() -> None:
    one = tiny()
    many = tiny(processes=3, run={"accumulate": 2})
    assert one.effective_batch == 4
    assert many.effective_batch == 24
    assert many.step_flops == 6 * one.step_flops
    assert many.steps_per_epoch == pytest.approx(10 / 24)
    assert many.memory_bytes == one.memory_bytes  # of one process, one batch at a time


def test_without_data_epochs_are_unknown() -> None:
    unknown = tiny(clips=None)
    assert unknown.steps_per_epoch is None
    assert unknown.epochs is None
    assert not any("epochs" in line for line in unknown.lines())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_those_of_a_network_that_runs(dropout: float) -> None:
    config = override(preset("tiny"), {"network": {"dropout": dropout}})
    unet = ExtendedUNet(config).train()
    own = {parameter.data_ptr() for parameter in unet.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    condition = MotionCondition(
        identity=torch.zeros(4, 3, 32, 32),
        motion_frames=torch.zeros(4, 2, 3, 32, 32),
        cues=Cues(torch.zeros(4, 5, 384), {"lips": torch.zeros(4, 5, 3)}),
        motion_noise=torch.zeros(4),
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = unet(torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64), condition)
    really = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert output.prediction.requires_grad
    # A dropout mask takes four bytes an element on the CPU, and one on CUDA, for which the plan is made.
    assert plan(config, 10).activation_bytes == pytest.approx(really, rel=0.01 if dropout == 0 else 0.1)


def test_memory_follows_the_batch_the_precision_and_checkpointing() -> None:
    usual, double = tiny(), tiny(optimisation={"batch_size": 8})
    assert double.activation_bytes == pytest.approx(2 * usual.activation_bytes, rel=0.05)
    assert tiny(optimisation={"precision": "bf16"}).activation_bytes < usual.activation_bytes
    assert tiny(run={"checkpoint_activations": True}).activation_bytes < usual.activation_bytes / 2
    assert tiny(run={"checkpoint_activations": True}).step_flops == pytest.approx(4 / 3 * usual.step_flops)
    assert double.state_bytes == usual.state_bytes


def test_planning_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    tiny(optimisation={"precision": "bf16"})
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.is_autocast_enabled("cpu")


def test_lines_are_aligned_and_in_units_people_read(crema: Plan) -> None:
    lines = crema.lines()
    assert len({len(line) - len(line[15:]) for line in lines}) == 1
    assert all(line[13:15] == "  " and line[15] != " " for line in lines)
    text = "\n".join(lines)
    for words in ("203.9 M", "996.8 GFLOP an example", "239.2 TFLOP", "10 at once x 8 processes", "5e-05", "6,622"):
        assert words in text
