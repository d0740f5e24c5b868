"""The arithmetic of benchmarks/train_speed.py, and that it runs."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
import torch
from conftest import program

from dheads.config import Config, preset
from dheads.dataset.dataset import Dataset
from dheads.training.plan import plan


@pytest.fixture(scope="module")
def train_speed() -> ModuleType:
    module = program("benchmarks/train_speed.py")
    module.CLIPS, module.CLIP_FRAMES, module.SMALL_PEAK_SIDE = 2, 6, 64
    return module


@pytest.fixture(scope="module")
def config() -> Config:
    return preset("tiny")


@pytest.fixture(scope="module")
def dataset(train_speed: ModuleType, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(train_speed.random_dataset(tmp_path_factory.mktemp("random"), config))


def test_summary_takes_medians(train_speed: ModuleType) -> None:
    turn = train_speed.Turn
    plain = [turn(10, 10.0, 1.0), turn(10, 5.0, 1.0), turn(10, 1000.0, 1.0)]
    ours = [turn(10, 2.0, 0.1), turn(10, 4.0, 0.1), turn(10, 1.0, 0.1)]
    assert train_speed.summary(plain, ours, example_flops=100, peak=2000.0) == pytest.approx(
        {
            "examples_per_second": 5.0,
            "plain_examples_per_second": 1.0,
            "ratio": 5.0,
            "waiting": 0.05,
            "plain_waiting": 0.1,
            "example_flops": 100,
            "flops_per_second": 500.0,
            "peak_flops_per_second": 2000.0,
            "share_of_peak": 0.25,
        }
    )


def test_random_pictures_are_a_prepared_dataset(dataset: Dataset, config: Config) -> None:
    dataset.check(config)
    assert len(dataset.split("train")) == 2
    assert dataset.frames(dataset.clips[0]).shape == (6, 32, 32, 3)
    assert dataset.frames(dataset.clips[0]).std() > 20


def test_both_ways_train_the_same(train_speed: ModuleType, dataset: Dataset, config: Config) -> None:
    report = train_speed.measure(dataset, config, torch.device("cpu"), steps=1, rounds=2)
    for name in ("plain", "ours"):
        assert [turn["examples"] for turn in report["turns"][name]] == [4, 4]
        assert all(0 < turn["waiting_seconds"] < turn["seconds"] for turn in report["turns"][name])
    assert report["example_flops"] == 3 * plan(config, None).forward_flops
    assert report["peak_flops_per_second"] > 0
    assert json.loads(json.dumps(report)) == report
    text = "\n".join(train_speed.lines(report))
    assert f"ratio    {report['ratio']:.2f}" in text


def test_both_have_the_same_gradient(train_speed: ModuleType, dataset: Dataset, config: Config) -> None:
    draws = train_speed.Batches(dataset, dataset.clips, config)
    ours = train_speed.OurTrainer(draws, config, torch.device("cpu"))
    plain = train_speed.PlainTrainer(draws, config, torch.device("cpu"))
    ours.run(1)
    plain.run(1)
    for mine, other in zip(ours.state.unet.parameters(), plain.unet.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5)
