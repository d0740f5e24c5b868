"""`dheads train` on real clips with the tiny preset: its files, resuming, failures, and what the network learns."""

from __future__ import annotations

import csv
import dataclasses
import errno
import itertools
import json
import math
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from real_data import Prepared, cut, decoded, dheads, prepare_command, sound_seconds
from safetensors import safe_open
from torch import Tensor
from typer.testing import Result

from dheads.config import Config, RunConfig, from_dict, override, preset, to_dict
from dheads.dataset.dataset import Dataset
from dheads.denoiser import Denoiser
from dheads.errors import DheadsError
from dheads.extensions import lips
from dheads.extensions.network import ExtendedUNet
from dheads.sampling.engine import Engine
from dheads.sampling.talker import generate
from dheads.system import devices
from dheads.system.locks import alone
from dheads.training import loop as verb
from dheads.training import objective, records
from dheads.training.batches import Batch
from dheads.training.records import Records
from dheads.training.state import TrainingState, learning_rate
from dheads.weights.checkpoints import load_checkpoint, load_model

pytest_plugins = "real_data"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_training")]

TINY = preset("tiny")
# Six steps that use every source of randomness, with dropout.
SHORT = {
    "optimisation": {"steps": 6},
    "run": {"log_every": 2, "checkpoint_every": 3, "sample_every": 6},
    "network": {"dropout": 0.1},
}
# A network without the lip code, whose fit takes most of the time of a short run.
PLAIN = {"extensions": {"codes": {"lips": False}}}
SPEED = {"examples_per_second", "waiting"}  # differs from run to run


RUN_KEYS = {field.name for field in dataclasses.fields(RunConfig)}


def quick(**changes: object) -> dict[str, dict[str, Any]]:
    """A run without the lip code and sample videos; changes: values in the sections run and optimisation."""
    changes = {"log_every": 1, "checkpoint_every": 1, "sample_clips": 0} | changes
    run = {key: value for key, value in changes.items() if key in RUN_KEYS}
    return PLAIN | {"run": run, "optimisation": {key: changes[key] for key in changes.keys() - run.keys()}}


def trained(data: Path, run: Path, *changes: dict[str, Any], **options: Any) -> Path:
    config = TINY
    for change in changes:
        config = override(config, change)
    return verb.train(config, data, run, progress=False, **options)


def flat(changes: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in changes.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def train_command(data: Path, run: Path, changes: dict[str, Any], *options: object) -> Result:
    pairs = [f"{key}={json.dumps(value)}" for key, value in flat(changes)]
    sets = [part for pair in pairs for part in ("--set", pair)]
    return dheads("train", "--data", data, "--out", run, "--preset", "tiny", "--device", "cpu", *sets, *options)


@dataclasses.dataclass
class Run:
    path: Path
    done: Result


@pytest.fixture(scope="module")
def short(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory, quick_training: None) -> Run:
    path = tmp_path_factory.mktemp("train") / "run"
    return Run(path, train_command(prepared.data, path, SHORT))


@pytest.fixture(scope="module")
def dataset(prepared: Prepared) -> Dataset:
    return Dataset(prepared.data)


def rows(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def learnt(run: Path) -> list[dict[str, float]]:
    """The rows of metrics without those that depend on the machine's load."""
    return [{name: value for name, value in row.items() if name not in SPEED} for row in rows(run)]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"tensorboard"}  # where that is installed


def state_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "state.pt", weights_only=True)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_runs(ours: Path, theirs: Path) -> None:
    """Weights, optimiser, metrics and sample videos are equal to the last bit."""
    mine, other = state_of(ours), state_of(theirs)
    assert mine["step"] == other["step"]
    assert same_tensors(mine["unet"], other["unet"])
    assert same_tensors(mine["ema"], other["ema"])
    for a, b in zip(mine["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True):
        assert same_tensors(a, b)
    assert learnt(ours) == learnt(theirs)
    assert names(ours) == names(theirs)
    for path in (theirs / "samples").iterdir():
        assert (ours / "samples" / path.name).read_bytes() == path.read_bytes()


# --- The files of a run


def test_the_command_prints_the_checkpoint(short: Run) -> None:
    assert short.done.exit_code == 0, short.done.stderr
    assert short.done.stdout == f"{short.path / 'weights.safetensors'}\n"
    assert "train: 100%" in short.done.stderr
    assert "examples/s" in short.done.stderr
    assert names(short.path) == {
        "config.toml",
        "metrics.jsonl",
        "events.jsonl",
        "samples",
        "state.pt",
        "best.safetensors",
        "weights.safetensors",
        "weights-0000003.safetensors",
        "weights-0000006.safetensors",
    }
    assert rows(short.path, "events") == []


def test_metrics(short: Run) -> None:
    losses = {"loss", "simple", "vlb", "lip", "eyes"}
    others = {"step", "lr", "grad_norm", "broken_clips", "bad_steps", "val_loss", "val_simple", "val_lip", "val_eyes"}
    quarters = {f"simple_q{k}" for k in (1, 2, 3, 4)}
    assert [row["step"] for row in rows(short.path)] == [2, 4, 6]
    for row in rows(short.path):
        assert losses | others | SPEED <= set(row) <= losses | others | SPEED | quarters
        assert all(math.isfinite(value) for value in row.values())
        for held_out in ("", "val_"):
            simple, lip, eyes = (row[held_out + name] for name in ("simple", "lip", "eyes"))
            total = simple + TINY.optimisation.lambda_lip * lip + TINY.extensions.codes["eyes"].weight * eyes
            assert row[f"{held_out}loss"] == pytest.approx(total, rel=1e-4)
        assert row["vlb"] == 0, "the tiny network has no learned variance"
        means = [row[name] for name in quarters & set(row)]
        assert min(means) <= row["simple"] <= max(means)
        assert 0 <= row["waiting"] < 1
        assert row["examples_per_second"] > 0
    config = override(TINY, SHORT)
    expected = [learning_rate(config, step, step / config.optimisation.steps) for step in (2, 4, 6)]
    assert [row["lr"] for row in rows(short.path)] == pytest.approx(expected, rel=1e-5)


def test_the_sample_video_shows_the_held_out_clip(short: Run, dataset: Dataset) -> None:
    """20 frames with sound: the generated face on the left, the true one on the right."""
    (path,) = (short.path / "samples").iterdir()
    assert path.name == "0000006-other-grid_other.mp4"
    frames = decoded(path)
    assert frames.shape == (20, 32, 64, 3)
    (clip,) = dataset.split("val")
    assert abs(frames[:, :, 32:].astype(float) - dataset.frames(clip)).mean() < 6
    assert sound_seconds(path) == pytest.approx(20 / 25, abs=0.07)  # in packets of 64 ms


def test_the_checkpoint_is_complete(short: Run, dataset: Dataset) -> None:
    unet, config, info = load_model(str(short.path / "weights.safetensors"))
    assert config == override(TINY, SHORT)
    assert from_dict(tomllib.loads((short.path / "config.toml").read_text(encoding="utf-8"))) == config
    assert info["training"] == {"steps": 6, "examples": 24, "clips": 5}
    codes = unet.lip_predictor.predict(dataset.lip_clips("train")[0].speech)
    assert codes.std(0).min() > 0.1, "the lip predictor was fitted and travels with the weights"


def test_the_checkpoint_holds_the_average_and_the_state_both(short: Run) -> None:
    weights = load_checkpoint(short.path / "weights.safetensors").tensors
    state = state_of(short.path)
    assert state["step"] == 6
    assert same_tensors(weights, state["ema"])
    assert not torch.equal(state["unet"]["stem.weight"], state["ema"]["stem.weight"])


def test_the_last_weights_and_the_best_are_kept(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, math.nan, 2.0, 1.0])
    monkeypatch.setattr(records.Records, "validate", lambda self: {"val_loss": next(losses)})
    trained(prepared.data, tmp_path, quick(steps=5, keep=2))
    assert {name for name in names(tmp_path) if name.endswith(".safetensors")} == {
        "best.safetensors",
        "weights.safetensors",
        "weights-0000004.safetensors",
        "weights-0000005.safetensors",
    }
    for name, step in (("best", 2), ("weights", 5), ("weights-0000004", 4), ("weights-0000005", 5)):
        assert load_checkpoint(tmp_path / f"{name}.safetensors").info["training"]["steps"] == step


# --- Resume

# Trains in a process of its own, which is killed in the fifth step.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from dheads import config
from dheads.extensions import lips
from dheads.training import loop as train, records
lips._solve = lambda gram, moment, ridge: moment / gram.diagonal()[:, None]
lips._RIDGES, lips._FOLDS, records._VALIDATION_EXAMPLES = (1.0,), 1, 4
advance = train.TrainingState.advance
def killed(state, *values):
    if state.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return advance(state, *values)
train.TrainingState.advance = killed
train.train(config.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]), progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_run_is_resumed_without_a_difference(
    prepared: Prepared, short: Run, warm: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a log row; the rows after the last saved state are written again, and only once."""
    config = override(TINY, SHORT)
    arguments = [json.dumps(to_dict(config)), str(prepared.data), str(tmp_path)]
    done = subprocess.run([*warm, "-c", KILLED, *arguments], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert state_of(tmp_path)["step"] == 3
    assert [row["step"] for row in rows(tmp_path)] == [2, 4]

    torch.manual_seed(77)  # results do not depend on other random numbers of this process
    monkeypatch.delattr(lips.LipPredictor, "fit")  # the lip code is in the state
    trained(prepared.data, tmp_path, SHORT)
    assert_same_runs(tmp_path, short.path)


def interrupted_at(where: int) -> Callable[..., dict[str, Tensor]]:
    """The function for the loss, with Ctrl-C at that step."""

    def loss(denoiser: Denoiser, batch: Batch, config: Config, step: int, part: int = 0) -> dict[str, Tensor]:
        if step == where:
            signal.raise_signal(signal.SIGINT)
        return objective.training_loss(denoiser, batch, config, step, part)

    return loss


def test_ctrl_c_saves_the_state_first(
    prepared: Prepared, short: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Called from Python, where Ctrl-C is an exception: the command line would end this process with exit code 130."""
    with monkeypatch.context() as patch:
        patch.setattr(verb, "training_loss", interrupted_at(3))
        with pytest.raises(KeyboardInterrupt):
            trained(prepared.data, tmp_path, SHORT)
    assert "ending after this step" in caplog.text
    assert state_of(tmp_path)["step"] == 4, "the step is finished first"
    trained(prepared.data, tmp_path, SHORT)
    assert_same_runs(tmp_path, short.path)


def test_two_trainers_do_not_share_a_folder(prepared: Prepared, tmp_path: Path) -> None:
    """The second is refused while the first runs."""
    (tmp_path / "run").mkdir()
    with alone(tmp_path / "run" / ".lock") as first:
        assert first
        done = train_command(prepared.data, tmp_path / "run", quick(steps=1))
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        f"error: {tmp_path / 'run'}: another dheads train is running there; wait for it, or choose another --out"
    )
    assert list((tmp_path / "run").iterdir()) == [], "no file of the first one is changed"
    assert train_command(prepared.data, tmp_path / "run", quick(steps=1)).exit_code == 0


# --- A run of limited time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes a second."""
    seconds = itertools.count()
    monkeypatch.setattr(
        verb, "time", SimpleNamespace(monotonic=lambda: float(next(seconds)), perf_counter=time.perf_counter)
    )


TIMED = quick(minutes=0.2, steps=1000, warmup_steps=0, learning_rate=1e-3, lr_schedule="cooldown", checkpoint_every=100)


def test_a_run_ends_after_its_time_with_its_cooldown_done(prepared: Prepared, tmp_path: Path, clock: None) -> None:
    done = train_command(prepared.data, tmp_path, TIMED)
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'weights.safetensors'}\n")
    assert "12/12" in done.stderr, "the bar shows how many steps there will be"
    progress = [row["step"] / 12 for row in rows(tmp_path)]
    assert len(progress) == 12
    # Constant, then linear from the eighth second on.
    wanted = [1e-3 * min(1.0, max(0.02, (1 - share) / 0.3)) for share in progress]
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx(wanted, rel=1e-5)
    assert "val_loss" in rows(tmp_path)[-1]
    assert load_checkpoint(tmp_path / "weights.safetensors").info["training"]["steps"] == 12
    assert state_of(tmp_path)["step"] == 12
    before = state_of(tmp_path)["seconds"]
    assert before == 12
    assert train_command(prepared.data, tmp_path, TIMED, "--quiet").exit_code == 0
    assert state_of(tmp_path)["seconds"] == before, "nothing is left to train"


def test_the_time_of_an_interrupted_run_continues(
    prepared: Prepared, tmp_path: Path, clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(verb, "training_loss", interrupted_at(4))
        with pytest.raises(KeyboardInterrupt):
            trained(prepared.data, tmp_path, TIMED)
    assert (state_of(tmp_path)["step"], state_of(tmp_path)["seconds"]) == (5, 5)
    trained(prepared.data, tmp_path, TIMED)
    assert (state_of(tmp_path)["step"], state_of(tmp_path)["seconds"]) == (12, 12)


# --- Runs that stay as they are


def test_a_finished_run_is_left_as_it_is(prepared: Prepared, short: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(short.path, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = train_command(prepared.data, run, SHORT, "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{run / 'weights.safetensors'}\n", "")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_of_another_configuration_is_refused(prepared: Prepared, short: Run) -> None:
    before = {path: path.read_bytes() for path in short.path.rglob("*") if path.is_file()}
    with pytest.raises(DheadsError, match=r"state\.pt: belongs to a run with optimisation.learning_rate = 0.001, but"):
        trained(prepared.data, short.path, SHORT, {"optimisation": {"learning_rate": 0.5}})
    assert {path: path.read_bytes() for path in short.path.rglob("*") if path.is_file()} == before


# --- What cannot be trained


def test_a_dataset_of_another_preset_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = dheads("train", "--data", prepared.data, "--out", out, "--preset", "small", "--device", "cpu", "--quiet")
    assert done.exit_code == 1
    assert f"error: {prepared.data}: prepared with size = 32, but the configuration wants 128; " in done.stderr
    assert not out.exists()


def test_a_dataset_with_nothing_to_train_on_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("dataset.toml", "clips.csv"):
        text = (prepared.data / name).read_text(encoding="utf-8")
        (data / name).write_text(text.replace(",train,", ",test,"), encoding="utf-8")
    with pytest.raises(DheadsError, match="has no clip in its train split"):
        trained(data, tmp_path / "run")


def with_clips(prepared: Prepared, data: Path, *beginnings: str) -> Path:
    """A copy of the dataset that lists only some clips."""
    shutil.copytree(prepared.data, data)
    lines = (data / "clips.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    chosen = [line for line in lines if line.startswith(("clip,", *beginnings))]
    (data / "clips.csv").write_text("".join(chosen), encoding="utf-8")
    return data


def test_photos_alone_teach_no_lip_code(prepared: Prepared, tmp_path: Path) -> None:
    """A network without it can be trained on them."""
    data = with_clips(prepared, tmp_path / "data", "still_")
    with pytest.raises(DheadsError, match=r"has no video to train on, .* set extensions.codes.lips=false"):
        trained(data, tmp_path / "run")
    trained(data, tmp_path / "plain", PLAIN, {"optimisation": {"steps": 2}, "run": {"sample_clips": 1}})
    (video,) = (tmp_path / "plain" / "samples").iterdir()
    assert len(decoded(video)) == 1
    assert not (tmp_path / "plain" / "best.safetensors").exists(), "there is no held-out speaker"


def test_an_output_that_is_a_file_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DheadsError, match=r"cannot make the folder .*file"):
        trained(prepared.data, tmp_path / "file")


# --- Bad steps


@pytest.fixture
def bad_at(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The steps, counted from 0, whose loss is not a number."""
    steps: set[int] = set()

    def broken(denoiser: Denoiser, batch: Batch, config: Config, step: int, part: int = 0) -> dict[str, Tensor]:
        terms = objective.training_loss(denoiser, batch, config, step, part)
        factor = math.nan if step in steps and part == 1 else 1
        return {name: value if name == "t" else value * factor for name, value in terms.items()}

    monkeypatch.setattr(verb, "training_loss", broken)
    return steps


def test_a_bad_step_is_reported_and_skipped(prepared: Prepared, tmp_path: Path, bad_at: set[int]) -> None:
    """The event names the clips of all its parts; the weights do not change, and the run continues."""
    bad_at |= {1, 2}
    trained(prepared.data, tmp_path, quick(steps=4, accumulate=2, keep=9))
    events = rows(tmp_path, "events")
    assert [(event["step"], event["kind"]) for event in events] == [(2, "bad_step"), (3, "bad_step")]
    assert events[0]["message"] == "step 2: the loss or its gradient is not finite"
    dataset = Dataset(prepared.data)
    assert len(events[0]["clips"]) == 2 * TINY.optimisation.batch_size
    assert set(events[0]["clips"]) <= {clip.clip for clip in dataset.split("train")}
    first, second, third, fourth = (
        load_checkpoint(tmp_path / f"weights-000000{step}.safetensors").tensors for step in (1, 2, 3, 4)
    )
    assert same_tensors(first, second)
    assert same_tensors(first, third)
    assert not same_tensors(third, fourth)
    metrics = rows(tmp_path)
    assert [row["bad_steps"] for row in metrics] == [0, 1, 2, 2]
    assert ["loss" in row for row in metrics] == [True, False, False, True]
    assert all(value is not None for row in metrics for value in row.values())


def test_a_run_that_stops_at_a_bad_step_can_be_resumed_after_it(
    prepared: Prepared, tmp_path: Path, bad_at: set[int]
) -> None:
    bad_at.add(2)
    changes = quick(steps=4, accumulate=2, checkpoint_every=9, bad_steps="stop")
    with pytest.raises(DheadsError, match=r"step 3: the loss or its gradient is not finite \(clips .*same command"):
        trained(prepared.data, tmp_path, changes)
    assert state_of(tmp_path)["step"] == 3
    trained(prepared.data, tmp_path, changes)
    assert [event["step"] for event in rows(tmp_path, "events")] == [3]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert load_checkpoint(tmp_path / "weights.safetensors").info["training"]["steps"] == 4


def test_too_many_bad_steps_end_the_run(prepared: Prepared, tmp_path: Path, bad_at: set[int]) -> None:
    bad_at |= set(range(2, 99))
    changes = quick(steps=99, accumulate=2, batch_size=1, checkpoint_every=99, log_every=99)
    with pytest.raises(DheadsError, match=r"step 22: .* at each of the last 20 steps; lower optimisation.learning_r"):
        trained(prepared.data, tmp_path, changes)
    assert len(rows(tmp_path, "events")) == 20


# --- Failures that do not end a run


def test_a_full_disk_does_not_end_a_run(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No large file can be written after the second step; those of the third step are written again."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    advance, write_video = TrainingState.advance, records.write_video

    def filling(state: TrainingState, *values: float) -> str | None:
        limit = 100_000 if state.step == 1 else before[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        return advance(state, *values)

    def full(path: Path, *media: Any) -> int:
        if path.name.startswith("0000002"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_video(path, *media)

    monkeypatch.setattr(TrainingState, "advance", filling)
    monkeypatch.setattr(records, "write_video", full)
    monkeypatch.setattr(records, "_SAMPLE_FRAMES", 4)
    try:
        trained(prepared.data, tmp_path, quick(steps=3, sample_every=1, sample_clips=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    events = rows(tmp_path, "events")
    assert [(event["step"], event["kind"]) for event in events] == [(2, "failed")] * 3
    beginnings = ("the weights are not saved", "the training state is not saved", "no sample video of other/grid_other")
    for event, beginning in zip(events, beginnings, strict=True):
        assert event["message"].startswith(f"step 2: {beginning}: ")
    assert [name for name in sorted(names(tmp_path)) if name.startswith("weights-")] == [
        "weights-0000001.safetensors",
        "weights-0000003.safetensors",
    ]
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))
    assert state_of(tmp_path)["step"] == 3
    videos = sorted((tmp_path / "samples").iterdir())
    assert [path.name[:7] for path in videos] == ["0000001", "0000003"]
    assert len(decoded(videos[0])) == 4
    assert sound_seconds(videos[0]) == pytest.approx(4 / 25, abs=0.07), "no more sound than picture"


def test_the_last_weights_must_be_written(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*values: object) -> None:
        raise DheadsError("cannot write the checkpoint")

    monkeypatch.setattr(records, "save_checkpoint", full)
    with pytest.raises(DheadsError, match="cannot write the checkpoint"):
        trained(prepared.data, tmp_path, quick(steps=2))
    assert [event["step"] for event in rows(tmp_path, "events")] == [1]
    assert state_of(tmp_path)["step"] == 1


def test_lost_clips_do_not_end_a_run(prepared: Prepared, tmp_path: Path) -> None:
    """One training clip is truncated, and the only held-out one is missing."""
    data = with_clips(prepared, tmp_path / "data", "s1/", "en/", "other/", "still_")
    lost, held_out = data / "clips" / "s1" / "grid_two.mp4", data / "clips" / "other" / "grid_other.mp4"
    lost.write_bytes(lost.read_bytes()[:5_000])
    held_out.unlink()
    run = tmp_path / "run"
    trained(data, run, quick(steps=6, log_every=6, checkpoint_every=9, sample_clips=1))
    (row,) = rows(run)
    assert row["broken_clips"] == 2
    assert "val_loss" not in row
    failed, video = "step 6: validation failed: ", "step 6: no sample video of other/grid_other: "
    broken, *events = sorted(rows(run, "events"), key=lambda event: event["kind"])
    assert (broken["kind"], list(broken["clips"])) == ("broken_clips", ["other/grid_other", "s1/grid_two"])
    assert broken["clips"]["s1/grid_two"].startswith(f"{lost}: ")
    assert broken["message"].startswith(f"2 clips cannot be read and are replaced by others: {held_out}: ")
    assert [event["message"].startswith(begin) for event, begin in zip(events, (failed, video), strict=True)]


# --- Starting from weights


def test_training_starts_from_given_weights(
    prepared: Prepared, short: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lip code is theirs too; another dropout rate is no other network."""
    monkeypatch.delattr(lips.LipPredictor, "fit")
    start = short.path / "weights.safetensors"
    trained(
        prepared.data,
        tmp_path,
        {"optimisation": {"steps": 1, "learning_rate": 0.0}, "run": {"sample_clips": 0}, "network": {"dropout": 0.3}},
        init=str(start),
    )
    assert same_tensors(load_checkpoint(tmp_path / "weights.safetensors").tensors, load_checkpoint(start).tensors)


@pytest.mark.parametrize(
    ("without", "with_it", "part", "last"),
    [
        ({"extensions": {"codes": {"eyes": None}}}, {}, "eye_embed", "2"),
        (
            {"extensions": {"patches": {"size": 2}}},
            {"extensions": {"patches": {"size": 2, "detail_channels": 8}}},
            "detail",
            "out_conv",
        ),
    ],
)
def test_weights_without_a_part_can_be_trained_on_with_it(
    prepared: Prepared, tmp_path: Path, without: dict[str, Any], with_it: dict[str, Any], part: str, last: str
) -> None:
    """At first it changes nothing: its last layer starts at zero."""
    optimisation = {"steps": 1, "learning_rate": 0.0, "weight_decay": 0.0}
    still = {"optimisation": optimisation, "run": {"sample_clips": 0}}
    lacking = trained(prepared.data, tmp_path / "lacking", still, without)
    having = trained(prepared.data, tmp_path / "having", still, with_it, init=str(lacking))
    start, tensors = load_checkpoint(lacking).tensors, load_checkpoint(having).tensors
    assert {name.split(".")[0] for name in tensors.keys() - start.keys()} == {part}
    assert same_tensors({name: tensors[name] for name in start}, start)
    assert tensors[f"{part}.{last}.weight"].abs().max() == tensors[f"{part}.{last}.bias"].abs().max() == 0
    others = [tensor for name, tensor in tensors.items() if name.startswith(part) and last not in name]
    assert max(float(tensor.abs().max()) for tensor in others) > 0


def test_weights_of_another_network_are_refused(prepared: Prepared, short: Run, tmp_path: Path) -> None:
    start = short.path / "weights.safetensors"
    message = r"weights\.safetensors: was trained with network.model_channels = 16, but the configuration has 32"
    with pytest.raises(DheadsError, match=message):
        trained(prepared.data, tmp_path / "run", {"network": {"model_channels": 32}}, init=str(start))
    with pytest.raises(DheadsError, match="neither a file nor a known name"):
        trained(prepared.data, tmp_path / "run", init="smal")


# --- Other ways of computing


def test_a_compiled_network_learns_the_same(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, but not compiled to machine code, which takes too long for a test. The weights keep their names."""
    compile_module, compiled = torch.nn.Module.compile, []

    def traced(module: torch.nn.Module, **options: object) -> None:
        compiled.append(module)
        compile_module(module, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    changes = quick(steps=2, checkpoint_every=2, log_every=2)
    trained(prepared.data, tmp_path / "plain", changes)
    assert not compiled
    trained(prepared.data, tmp_path / "compiled", changes, {"run": {"compile": True}})
    assert len(compiled) == 1
    mine, other = state_of(tmp_path / "compiled"), state_of(tmp_path / "plain")
    assert mine["unet"].keys() == other["unet"].keys()
    for name, tensor in mine["unet"].items():
        torch.testing.assert_close(tensor, other["unet"][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_is_used_on_machines_that_have_it(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: bool
) -> None:
    asked: list[str] = []

    class Noted(Denoiser):
        def __init__(self, unet: ExtendedUNet, precision: str, *network: object) -> None:
            asked.append(precision)
            super().__init__(unet, "fp32", *network)

    monkeypatch.setattr(verb, "Denoiser", Noted)
    monkeypatch.setattr(records, "Denoiser", Noted)
    monkeypatch.setattr(devices, "best_dtype", lambda _: torch.bfloat16 if has else torch.float32)
    trained(prepared.data, tmp_path, quick(steps=1, precision="bf16"))
    assert asked == ["bf16" if has else "fp32"] * 2, "of the trained network and of its average"


def test_checkpointed_activations_learn_the_same(prepared: Prepared, tmp_path: Path) -> None:
    changes = quick(steps=2, checkpoint_every=2, log_every=2) | {"network": {"dropout": 0.1}}
    trained(prepared.data, tmp_path / "plain", changes)
    trained(prepared.data, tmp_path / "checkpointed", changes, {"run": {"checkpoint_activations": True}})
    mine, other = state_of(tmp_path / "checkpointed"), state_of(tmp_path / "plain")
    assert same_tensors(mine["unet"], other["unet"])


def test_a_training_set_in_the_memory_of_the_device_changes_nothing(
    prepared: Prepared, short: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "fits", lambda dataset, clips, device: True)
    trained(prepared.data, tmp_path, SHORT)
    assert_same_runs(tmp_path, short.path)


@pytest.mark.parametrize(("precision", "kept"), [("bf16", torch.float16), ("fp32", torch.float32)])
def test_weights_are_saved_in_the_precision_of_the_training(
    prepared: Prepared, tmp_path: Path, precision: str, kept: torch.dtype
) -> None:
    trained(prepared.data, tmp_path, quick(steps=1, precision=precision))
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {kept}  # noqa: SIM118


# --- What the network learns


def test_validation_is_the_same_every_time(prepared: Prepared, tmp_path: Path) -> None:
    """It uses the val split; a run without that split has no validation."""
    config = override(TINY, PLAIN)
    dataset = Dataset(prepared.data)
    state = TrainingState(ExtendedUNet(config), config)
    written = Records(tmp_path, dataset, state, "fp32")
    first = written.validate()
    torch.manual_seed(3)
    assert written.validate() == first
    assert set(first) == {"val_loss", "val_simple", "val_lip", "val_eyes"}
    dataset.clips = [clip for clip in dataset.clips if clip.split == "train"]
    assert Records(tmp_path, dataset, state, "fp32").validate() == {}


def test_validation_sees_held_out_clips_as_they_are(prepared: Prepared, tmp_path: Path) -> None:
    """However training alters its own: else the best weights would be those of the luckiest examples."""
    dataset, losses = Dataset(prepared.data), []
    altered = {
        "examples": {"augment": False},
        "sound": {"dropout": 0.9},
        "motion": {"holes": 1.0},
        "codes": {"eyes": {"event_share": 1.0}},
    }
    for changes in ({}, {"extensions": altered}):
        config = override(override(TINY, PLAIN), changes)
        torch.manual_seed(0)
        state = TrainingState(ExtendedUNet(config), config)
        losses.append(Records(tmp_path, dataset, state, "fp32").validate())
    assert losses[0] == losses[1]


def test_a_tiny_model_learns_one_clip_and_its_mouth_follows_the_sound(
    shared: Path, prepared: Prepared, tmp_path: Path, tried: list[str]
) -> None:
    """It reproduces the clip from its first frame and its sound; with another sound the mouth moves differently."""
    cut(shared / "data" / "grid" / "other_brbk7n.mp4", tmp_path / "raw" / "speaker" / "clip.mp4", 52)
    splits = tmp_path / "splits.csv"
    with splits.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("clip", "speaker", "split"), ("speaker/clip.mp4", "speaker", "train")])
    assert prepare_command(tmp_path / "raw", splits, tmp_path / "data").exit_code == 0
    unaltered = {
        "examples": {"augment": False},
        "sound": {"dropout": 0.0},
        "motion": {"drift": 0.0, "holes": 0.0},
        "rollouts": {"share": 0.0},
        "patches": {"size": 4},  # as the packaged weights have patches; a step takes a third as long
    }
    optimisation = {"steps": 140, "learning_rate": 4e-3, "warmup_steps": 20, "ema_decay": 0.98, "lambda_lip": 1.0}
    weights = trained(
        tmp_path / "data",
        tmp_path / "run",
        {"diffusion": {"prediction": "x_0"}, "extensions": unaltered, "network": {"channel_mult": [1]}},
        quick(**optimisation, log_every=140, checkpoint_every=140),
    )
    unet, _, _ = load_model(str(weights))
    dataset, others = Dataset(tmp_path / "data"), Dataset(prepared.data)
    (clip,) = dataset.clips
    truth, labels = dataset.frames(clip), dataset.labels(clip)
    (other,) = (clip for clip in others.clips if clip.clip == "en/talkvid_en")

    x0, y0 = labels["mouth_box"][:, :2].amin(0).int().tolist()
    x1, y1 = labels["mouth_box"][:, 2:].amax(0).int().tolist()

    def mouth(frames: np.ndarray) -> np.ndarray:
        return frames[:, y0:y1, x0:x1].astype(float).mean(3).reshape(len(frames), -1)

    mean = mouth(truth).mean(0)
    main = np.linalg.svd(mouth(truth) - mean, full_matrices=False)[2][0]  # how this mouth mostly changes

    def movement(frames: np.ndarray) -> np.ndarray:
        return (mouth(frames) - mean) @ main

    def spoken(speech: Tensor) -> np.ndarray:
        return np.stack(list(generate(Engine(unet), truth[0], speech)))

    count = other.frames
    own, foreign = spoken(labels["speech"]), spoken(others.labels(other)["speech"])
    assert np.corrcoef(movement(own), movement(truth))[0, 1] > 0.9
    assert np.corrcoef(movement(truth), labels["lips"][:, 0])[0, 1] > 0.8, "it is the opening of the mouth"
    assert np.corrcoef(movement(foreign), movement(truth[:count]))[0, 1] < 0.6
    assert abs(mouth(own) - mouth(truth)).mean() < 0.75 * abs(mouth(truth) - mouth(truth[:1])).mean()
