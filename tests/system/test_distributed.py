"""Training in several processes: their ranks, what they exchange, and that they train as one process does."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from real_data import Prepared

from dheads.config import override, preset
from dheads.errors import DheadsError
from dheads.system.distributed import World, joined, world
from dheads.training import loop as verb
from dheads.weights.checkpoints import load_checkpoint

pytest_plugins = "real_data"

TINY = preset("tiny")


# --- Ranks


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of rank 3 of eight processes on two machines."""
    for name, value in {"RANK": 3, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    return monkeypatch


def test_a_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # as a cluster may set it, without torchrun
    monkeypatch.delenv("RANK", raising=False)
    with joined("mps") as here:
        assert here == world() == World(rank=0, size=1, local_rank=0, local_size=1)
        assert here.is_main
        values = torch.ones(2)
        assert here.total(values) is values
        here.share([values])
        assert here.gather("me") == ["me"]
        network = torch.nn.Linear(2, 2)
        assert here.parallel(network) is network
        with here.apart(network):
            pass


def test_a_process_of_torchrun(torchrun: pytest.MonkeyPatch) -> None:
    here = world()
    assert here == World(rank=3, size=8, local_rank=1, local_size=4)
    assert not here.is_main
    assert here.device("cuda") == torch.device("cuda:1")
    assert here.device("cpu") == torch.device("cpu")


def test_an_environment_without_numbers_is_refused(torchrun: pytest.MonkeyPatch) -> None:
    torchrun.setenv("LOCAL_RANK", "one")
    with pytest.raises(DheadsError, match="must be numbers; let torchrun set them"):
        world()


def test_processes_that_cannot_work_together_are_refused(torchrun: pytest.MonkeyPatch) -> None:
    with pytest.raises(DheadsError, match="can train on cuda or cpu, not on mps"), joined("mps"):
        pass
    torchrun.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DheadsError, match="4 processes were started here, but there are 1 GPUs"), joined("cuda"):
        pass
    torchrun.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(DheadsError, match="the 8 processes do not find each other; start them by torchrun"):
        joined("cpu").__enter__()


def test_processes_that_see_different_states_are_refused(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "gather", lambda self, value: [value, 40])
    config = override(TINY, {"conditioning": {"lip_dims": 0}})
    with pytest.raises(DheadsError, match=r"not all processes see its state.pt; choose an --out that all machines"):
        verb.train(config, prepared.data, tmp_path, progress=False)


# --- Training


def test_two_processes_learn_what_one_with_two_batches_learns(
    prepared: Prepared, warm: list[str], tmp_path: Path
) -> None:
    """Two processes under torchrun start from weights that only the main one reads; then one process continues."""
    common = {"log_every": 1, "checkpoint_every": 3, "sample_clips": 0}
    steps = {"conditioning": {"lip_dims": 0}, "model": {"dropout": 0.1}, "training": common | {"steps": 3}}
    start = override(TINY, steps | {"training": common | {"steps": 1, "seed": 5, "checkpoint_every": 1}})
    init = str(verb.train(start, prepared.data, tmp_path / "start", progress=False))
    one, two = tmp_path / "one", tmp_path / "two"
    config = override(TINY, steps)
    verb.train(override(config, {"training": {"accumulate": 2}}), prepared.data, one, init=init, progress=False)

    sets = [f"{table}.{key}={value}" for table in steps for key, value in steps[table].items()]
    # The processes find each other by an address that needs no look-up of this machine's name.
    command = [*warm, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "--no-python", *warm, "-m", "dheads", "train"]
    command += ["--data", str(prepared.data), "--out", str(two), "--preset", "tiny"]
    command += ["--device", "cpu", "--init", init, *(part for pair in sets for part in ("--set", pair))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("3 steps of 8 examples") == 1, "four of each; only the main process writes messages"

    ours, theirs = rows(two), rows(one)
    assert [row["step"] for row in ours] == [1, 2, 3]
    for mine, other in zip(ours, theirs, strict=True):
        for name in mine.keys() - {"examples_per_second", "waiting"}:
            assert mine[name] == pytest.approx(other[name], rel=2e-5, abs=1e-7), name
    mine, other = (load_checkpoint(run / "weights.safetensors") for run in (two, one))
    assert mine.info == other.info
    for name, tensor in mine.tensors.items():
        torch.testing.assert_close(tensor, other.tensors[name], rtol=1e-4, atol=2e-6)

    # The state does not know how many processes there were, only how many batches a step has.
    with pytest.raises(DheadsError, match="a run of 2 batches a step, but now there are 1"):
        verb.train(config, prepared.data, two, progress=False)
    verb.train(override(config, {"training": {"accumulate": 2}}), prepared.data, two, progress=False)


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
