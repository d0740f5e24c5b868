"""Codes: one class and a line in the registry are all that a further one needs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from real_data import Prepared
from torch import Tensor

from dheads.config import Config, override, preset
from dheads.extensions.codes import CODES
from dheads.sampling.engine import Engine
from dheads.sampling.talker import generate
from dheads.training.loop import train
from dheads.weights.checkpoints import load_model

pytest_plugins = "real_data"
pytestmark = pytest.mark.usefixtures("quick_training")


class Turn:
    """A track that turns to and fro, once a second."""

    reach = 0

    def window(self, frame: int, speech: Tensor, at: int, context: int) -> Tensor:
        frames = torch.arange(frame - context, frame + context + 1)
        return torch.sin(2 * torch.pi * frames / 25)[:, None]


class YawCode:
    """How far the nose is off the middle of the eyes, in eye distances."""

    name, embedding, dims = "yaw", "yaw_embed", 1
    usual = (1.0,)
    is_heard, begins_at_zero = False, True
    points = range(27, 36)

    def measured(self, labels: Mapping[str, Tensor]) -> Tensor:
        points = labels["landmarks"]
        left, right, nose = points[:, 36:42].mean(1), points[:, 42:48].mean(1), points[:, 30]
        return ((nose - (left + right) / 2) / (right - left).norm(dim=1, keepdim=True))[:, :1]

    def events(self, code: Tensor) -> list[int]:
        return []

    def fitted(self, config: Config) -> None:
        return None

    def normalised(self, code: Tensor, fitted: object) -> Tensor:
        return code

    def track(self, fitted: object, seed: int, event_rate: float) -> Turn:
        return Turn()


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    monkeypatch.setitem(CODES, "yaw", YawCode())
    changes = {
        "optimisation": {"steps": 4},
        "run": {"checkpoint_every": 4, "sample_every": 100, "log_every": 4},
        "extensions": {
            "codes": {"yaw": {"context": 1, "noise": 0.1, "weight": 0.5}, "lips": False},
            "rollouts": {"start": 0.5},
        },
    }
    return override(preset("tiny"), changes)


def test_a_further_code_trains_rolls_out_and_samples(config: Config, prepared: Prepared, tmp_path: Path) -> None:
    weights = train(config, prepared.data, tmp_path / "run", progress=False)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"yaw": ' in metrics  # its loss
    unet, loaded, _ = load_model(str(weights))
    assert loaded.extensions.codes["yaw"].context == 1
    assert unet.get_submodule("yaw_embed")[0].in_features == 3
    # Not only zeros any more: the network was given the code.
    assert unet.get_submodule("yaw_embed")[2].weight.abs().sum() > 0
    photo = np.full((32, 32, 3), 128, np.uint8)
    speech = torch.randn(3, 384, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        unet.get_submodule("yaw_embed")[2].weight.normal_(generator=torch.Generator().manual_seed(0))
    frames = list(generate(Engine(unet, dtype=torch.float32), photo, speech))
    still = {"yaw": torch.zeros(3, 1)}
    others = list(generate(Engine(copy.deepcopy(unet), dtype=torch.float32), photo, speech, codes=still))
    assert len(frames) == 3
    assert not np.array_equal(frames[2], others[2])
