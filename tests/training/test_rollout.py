"""Motion frames that the network generates itself during training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from real_data import Prepared
from torch import Tensor

from dheads.config import Config, override, preset
from dheads.dataset.dataset import Dataset
from dheads.extensions.copying import mouth_mask
from dheads.extensions.network import ExtendedUNet
from dheads.training.batches import Batch, Batches
from dheads.training.rollout import RollOuts

pytest_plugins = "real_data"

LATE = 30  # a step with roll-outs, which are the last three tenths of the run


def config_of(anchor: float) -> Config:
    extensions = {"motion": {"anchor": anchor}, "examples": {"augment": False}}
    changes = {"diffusion": {"prediction": "x_0"}, "optimisation": {"batch_size": 16}, "extensions": extensions}
    return override(preset("tiny"), changes)


@pytest.fixture(scope="module")
def batch(prepared: Prepared) -> Batch:
    dataset = Dataset(prepared.data)
    return Batches(dataset, dataset.split("train"), config_of(0)).batch(LATE, 0)


def led(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The examples that have a lead, their identities, and the last frame before those to generate."""
    lead = batch.lead
    assert lead is not None
    assert 1 < len(lead.index) < 16
    return lead.index, batch.identity[lead.index], lead.motion_frames[:, -1]


@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_frames_follow_one_from_the_other(batch: Batch, anchor: float) -> None:
    """A new network's x_0 is the mean of its own, which is 0, the last motion frame and the identity.

    True motion frames come as they are: a batch anchors them.
    """
    index, identity, last = led(batch)
    made = RollOuts(ExtendedUNet(config_of(anchor)).eval(), config_of(anchor))(batch, LATE)
    outside = (mouth_mask(preset("tiny").alignment, 32, torch.device("cpu")) == 0).expand_as(identity)
    for k in range(2):
        last = torch.lerp((last + identity) / 3, identity, anchor)
        generated = made.motion_frames[index, k]
        torch.testing.assert_close(generated[outside], last[outside], rtol=0, atol=0.02)
    assert made.lead is None


def test_other_examples_stay_as_they_are(batch: Batch) -> None:
    config = config_of(0)
    made = RollOuts(ExtendedUNet(config).eval(), config)(batch, LATE)
    others = [k for k in range(16) if k not in led(batch)[0].tolist()]
    assert torch.equal(made.motion_frames[others], batch.motion_frames[others])
    for field in dataclasses.fields(Batch):
        if field.name not in {"motion_frames", "lead"}:
            assert getattr(made, field.name) is getattr(batch, field.name)
    assert RollOuts(ExtendedUNet(config), config)(made, LATE) is made, "nothing is left to generate"


def test_it_is_a_function_of_the_seed_and_the_step(batch: Batch) -> None:
    config = config_of(0.5)
    torch.manual_seed(0)
    unet = ExtendedUNet(config).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    rolled_out = RollOuts(unet, config)
    first, again, other = (rolled_out(batch, step).motion_frames for step in (LATE, LATE, LATE + 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_it_follows_the_network_without_copying_it_again(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a training step the frames are generated with the new weights, loaded into the same copy of the network."""
    config = config_of(0.5)
    torch.manual_seed(0)
    unet = ExtendedUNet(config).eval().requires_grad_(False)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    rolled_out = RollOuts(unet, config)
    before = rolled_out(batch, LATE).motion_frames
    for parameter in unet.parameters():
        parameter.mul_(1.1)
    wanted = RollOuts(unet, config)(batch, LATE).motion_frames
    monkeypatch.setattr("copy.deepcopy", None)
    after = rolled_out(batch, LATE).motion_frames
    assert torch.equal(after, wanted)
    assert not torch.equal(after, before)
    assert rolled_out._engine is not None
    assert not rolled_out._engine.records, "no graphs are recorded, as batch sizes vary"
