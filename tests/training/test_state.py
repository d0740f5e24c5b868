"""The training state: steps, bad steps, the learning rate, and saving and resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dheads.config import Config, from_dict, override, preset, to_dict
from dheads.config.old_keys import RENAMED
from dheads.errors import DheadsError
from dheads.extensions.network import ExtendedUNet
from dheads.training import state as module
from dheads.training.state import TrainingState, check_start, differences, learning_rate

TINY = preset("tiny")


def fresh(config: Config = TINY, parts: int = 1) -> TrainingState:
    torch.manual_seed(0)
    return TrainingState(ExtendedUNet(config).to(memory_format=torch.channels_last), config, parts)


def take(state: TrainingState, scale: float = 7.0, lr: float = 1e-2, loss: float = 1.0) -> str | None:
    """A step whose loss is proportional to the sum of the first layer's weights."""
    state.optimizer.zero_grad(set_to_none=True)
    (scale * state.unet.stem.weight.sum()).backward()
    return state.advance(loss, float(state.clip_gradient()), lr)


def tensors(state: TrainingState) -> dict[str, Tensor]:
    named = {f"unet.{name}": value for name, value in state.unet.state_dict().items()}
    named |= {f"ema.{name}": value for name, value in state.ema.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        named |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    return {name: value.clone() for name, value in named.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- One step


def test_one_update() -> None:
    """`clip_gradient` returns the norm before clipping; the average's decay is min(decay, (1 + n) / (10 + n))."""
    config = override(TINY, {"optimisation": {"ema_decay": 0.9, "grad_clip": 0.5}})
    state = fresh(config)
    start = state.unet.stem.weight.detach().clone()
    for step, decay in ((1, 2 / 11), (2, 3 / 12)):
        old = state.ema.stem.weight.clone()
        state.optimizer.zero_grad(set_to_none=True)
        (7 * state.unet.stem.weight.sum()).backward()
        norm = float(state.clip_gradient())
        assert norm == pytest.approx(7 * math.sqrt(start.numel()), rel=1e-4)
        assert float(state.unet.stem.weight.grad.norm()) == pytest.approx(0.5, rel=1e-4)
        assert state.advance(1.0, norm, 1e-2) is None
        assert state.step == step
        torch.testing.assert_close(state.ema.stem.weight, decay * old + (1 - decay) * state.unet.stem.weight)
    # Adam's first steps are the learning rate, whatever the gradient's size.
    torch.testing.assert_close(state.unet.stem.weight, start - 2e-2, rtol=0, atol=1e-5)
    assert not state.ema.training
    assert not any(parameter.requires_grad for parameter in state.ema.parameters())


def test_without_a_limit_the_gradient_stays_as_it_is() -> None:
    config = override(TINY, {"optimisation": {"grad_clip": None}})
    state = fresh(config)
    (7 * state.unet.stem.weight.sum()).backward()
    assert float(state.clip_gradient()) == pytest.approx(7 * math.sqrt(state.unet.stem.weight.numel()), rel=1e-4)
    assert (state.unet.stem.weight.grad == 7).all()


def test_the_paper_is_adam() -> None:
    """The optimiser of the paper's presets does what torch.optim.Adam does."""
    config = override(TINY, {"optimisation": {"weight_decay": 0.0, "grad_clip": None}})
    state = fresh(config)
    theirs = state.unet.stem.weight.detach().clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=1e-2)
    for step in range(3):
        state.optimizer.zero_grad(set_to_none=True)
        adam.zero_grad()
        for weight in (state.unet.stem.weight, theirs):
            (weight**3 * (step + 1)).sum().backward()
        adam.step()
        assert state.advance(1.0, 1.0, 1e-2) is None
    torch.testing.assert_close(state.unet.stem.weight, theirs)


@pytest.mark.parametrize(("loss", "norm"), [(1.0, math.nan), (1.0, math.inf), (math.nan, 1.0)])
def test_a_step_that_is_not_finite_changes_only_the_count(loss: float, norm: float) -> None:
    state = fresh()
    take(state)
    before, usual = tensors(state), state.usual_norm
    assert state.advance(loss, norm, 1e-2) == "step 2: the loss or its gradient is not finite"
    assert same(tensors(state), before)
    assert (state.step, state.bad_steps, state.bad_in_a_row, state.usual_norm) == (2, 1, 1, usual)
    assert take(state) is None
    assert (state.step, state.bad_steps, state.bad_in_a_row) == (3, 1, 0)


def test_an_exploding_gradient_is_a_bad_step_after_the_first_hundred() -> None:
    """Its norm is over 100 times the running average of the good ones, with decay 0.99."""
    state = fresh()
    (7 * state.unet.stem.weight.sum()).backward()
    assert state.advance(1.0, 2.0, 0.0) is None
    assert state.advance(1.0, 1e3, 0.0) is None, "among the first hundred"
    assert state.usual_norm == pytest.approx(0.99 * 2 + 0.01 * 1e3)
    for _ in range(98):
        state.advance(1.0, 2.0, 0.0)
    usual = state.usual_norm
    assert state.advance(1.0, 99 * usual, 0.0) is None
    usual = state.usual_norm
    before = tensors(state)
    trouble = state.advance(1.0, 101 * usual, 1e-2)
    assert trouble == f"step 102: the gradient's norm is {101 * usual:.3g}, but usually {usual:.3g}"
    assert same(tensors(state), before)
    assert state.usual_norm == usual


def test_rows_of_means() -> None:
    state = fresh()
    for total, count in ((6.0, 2), (1.0, 1), (0.0, 0)):
        state.note("loss", total, count)
    state.note("absent", 0.0, 0)
    assert state.finish_row() == {"loss": pytest.approx(7 / 3)}
    assert state.finish_row() == {}


# --- The learning rate


def rate(config: Config, step: int) -> float:
    return learning_rate(config, step, step / config.optimisation.steps)


def test_the_papers_learning_rate() -> None:
    """Times 0.8 every 1/18 of the steps."""
    config = override(preset("crema"), {"optimisation": {"steps": 1800}})
    for step in (0, 1, 99, 100, 199, 200, 899, 900, 1799):
        assert rate(config, step) == pytest.approx(5e-5 * 0.8 ** (step // 100))


def test_the_cooldown_learning_rate() -> None:
    """A linear warm-up, then constant, and in the last 30 % linear towards 0, but at least 2 %."""
    optimisation = {"steps": 1000, "learning_rate": 0.1, "lr_schedule": "cooldown", "warmup_steps": 50}
    config = override(TINY, {"optimisation": optimisation})
    assert [rate(config, step) for step in (0, 24, 49)] == pytest.approx([0.1 / 50, 0.05, 0.1])
    assert [rate(config, step) for step in (50, 400, 700)] == pytest.approx([0.1] * 3)
    assert [rate(config, step) for step in (850, 970, 999)] == pytest.approx([0.05, 0.01, 0.002])


# --- A run of limited time


def test_time_drives_the_schedules_where_it_ends_the_run() -> None:
    """Half of the time is half of the run, and the cooldown is done when the time is over."""
    optimisation = {"steps": 1000, "warmup_steps": 0, "lr_schedule": "cooldown", "learning_rate": 0.1}
    limited = {"run": {"minutes": 1.0}, "extensions": {"rollouts": {"start": 0.5}}}
    state = fresh(override(TINY, {"optimisation": optimisation}, limited))
    seen = []
    while not state.is_done:
        seen.append((state.progress, learning_rate(state.config, state.step, state.progress), state.rollout_step))
        state.advance(1.0, 1.0, 0.0, seconds=6.0)
    assert state.step == 10
    assert [progress for progress, _, _ in seen] == pytest.approx([k / 10 for k in range(10)])
    assert [lr for _, lr, _ in seen] == pytest.approx([0.1] * 8 + [0.1 * 0.2 / 0.3, 0.1 * 0.1 / 0.3])
    # Batches are prepared some steps ahead, so that roll-outs begin with a step whose batch cannot be ready yet.
    assert [step for _, _, step in seen] == [500] * 5 + [37] * 5


def test_steps_may_end_a_run_before_its_time() -> None:
    limited = {"run": {"minutes": 60.0}, "extensions": {"rollouts": {"start": 0.5}}}
    state = fresh(override(TINY, {"optimisation": {"steps": 4}}, limited))
    for _ in range(4):
        assert not state.is_done
        assert state.rollout_step == 2
        state.advance(1.0, 1.0, 0.0, seconds=6.0)
    assert state.is_done
    assert state.progress == 1


# --- Save and resume


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingState]:
    """Three good steps and a bad one, in the middle of a log row."""
    state = fresh(parts=2)
    for _ in range(3):
        take(state)
        state.note("loss", 1.5, 1)
    state.advance(math.nan, math.nan, 1.0)
    state.best, state.seconds, state.rollout_step = 0.25, 12.5, 20.0
    path = tmp_path_factory.mktemp("state") / "state.pt"
    state.save(path)
    return path, state


def test_a_state_is_restored_completely(saved: tuple[Path, TrainingState]) -> None:
    path, state = saved
    other = fresh(parts=2)
    start = tensors(other)
    other.resume(path.with_name("absent.pt"))
    assert other.step == 0
    assert same(tensors(other), start), "without a file it stays as it is"
    other.resume(path)
    counts = ("step", "bad_steps", "bad_in_a_row", "usual_norm", "best", "row", "seconds", "rollout_step")
    wanted = [4, 1, 1, state.usual_norm, 0.25, {"loss": [4.5, 3]}, 12.5, 20]
    assert [getattr(other, name) for name in counts] == wanted
    assert same(tensors(other), tensors(state))
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]


def test_a_resumed_state_goes_on_in_the_same_way(tmp_path: Path) -> None:
    state, other = fresh(), fresh()
    take(state)
    state.save(tmp_path / "state.pt")
    other.resume(tmp_path / "state.pt")
    for _ in range(3):
        assert take(other) is take(state) is None
    assert same(tensors(other), tensors(state))


FREE = {
    "log_every": 7,
    "checkpoint_every": 7,
    "keep": 7,
    "sample_every": 7,
    "sample_clips": 7,
    "compile": True,
    "checkpoint_activations": True,
    "bad_steps": "stop",
    "accumulate": 2,  # two processes before, and now one
    "minutes": 3.0,
}


def test_the_section_run_may_differ(saved: tuple[Path, TrainingState]) -> None:
    other = fresh(override(TINY, {"run": FREE}), parts=2)
    other.resume(saved[0])
    assert other.step == 4
    assert json.loads(torch.load(saved[0], weights_only=True)["config"]) != to_dict(other.config)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"optimisation": {"learning_rate": 0.5}}, "optimisation.learning_rate = 0.001, but now it is 0.5"),
        ({"optimisation": {"batch_size": 2}}, "optimisation.batch_size = 4, but now it is 2"),
        ({"optimisation": {"seed": 3, "steps": 50}}, "optimisation.steps = 40, but now it is 50"),
        ({"extensions": {"motion": {"noise": 0.2}}}, "extensions.motion.noise = 0.3, but now it is 0.2"),
        ({"name": "mine"}, "name = 'tiny', but now it is 'mine'"),
    ],
)
def test_another_configuration_is_refused(saved: tuple[Path, TrainingState], change: dict, difference: str) -> None:
    """The message names the first key that differs."""
    with pytest.raises(DheadsError) as error:
        fresh(override(TINY, change), parts=2).resume(saved[0])
    assert str(error.value) == f"{saved[0]}: belongs to a run with {difference}; choose another --out, or that value"


def test_another_number_of_batches_a_step_is_refused(saved: tuple[Path, TrainingState]) -> None:
    with pytest.raises(DheadsError, match=r"of 2 batches a step, but now there are 4; .* their product is 2"):
        fresh(parts=4).resume(saved[0])


def test_an_older_state_resumes(saved: tuple[Path, TrainingState], tmp_path: Path) -> None:
    """One without keys that are new, in the configuration and in the state."""
    state = torch.load(saved[0], weights_only=True)
    config = json.loads(state["config"])
    del config["preparation"], config["run"]["accumulate"], config["run"]["keep"]
    kept = {name: state[name] for name in ("step", "unet", "ema", "optimizer")}
    torch.save(kept | {"config": json.dumps(config)}, tmp_path / "state.pt")
    other = fresh()
    other.resume(tmp_path / "state.pt")
    assert (other.step, other.bad_steps, other.usual_norm, other.best, other.row) == (4, 0, None, math.inf, {})
    assert same(tensors(other), tensors(saved[1]))


def with_old_keys(config: Config) -> dict[str, Any]:
    """The configuration as dictionaries with the keys of earlier versions."""
    new, old = to_dict(config), {}
    for old_key, new_key in RENAMED.items():
        *tables, name = new_key.split(".")
        values = new
        for table in tables:
            values = values.get(table, {})
        if name in values:
            section, key = old_key.split(".")
            old.setdefault(section, {})[key] = values.pop(name)
    codes = new.pop("extensions")["codes"]
    dims = {"lip_dims": 3 if "lips" in codes else 0, "eye_dims": 1 if "eyes" in codes else 0}
    assert not new.pop("network")
    assert not new.pop("optimisation")
    assert not new.pop("run")
    for section, values in new.items():
        if isinstance(values, dict):
            old[section] = values | old.get(section, {})
    old["conditioning"] |= dims
    return {"name": config.name} | old


@pytest.mark.parametrize(
    "changes", [{}, {"extensions": {"codes": {"lips": None}, "copying": {"gates": False}, "snr_clip": None}}]
)
def test_a_state_with_old_keys_resumes(tmp_path: Path, changes: dict[str, Any]) -> None:
    """And goes on as one with the new keys does."""
    config = override(TINY, changes)
    state, other = fresh(config, parts=2), fresh(config, parts=2)
    take(state)
    state.note("eyes", 1.5, 2)
    state.save(tmp_path / "state.pt")
    old = with_old_keys(config)
    assert {"model", "training"} <= old.keys()
    assert not {"network", "optimisation", "run", "extensions"} & old.keys()
    assert from_dict(old) == config
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    saved |= {"config": json.dumps(old), "row": {"eye": saved["row"]["eyes"]}}
    torch.save(saved, tmp_path / "state.pt")
    other.resume(tmp_path / "state.pt")
    assert (other.step, other.row) == (1, {"eyes": [1.5, 2]})
    for _ in range(2):
        assert take(other) is take(state) is None
    assert same(tensors(other), tensors(state))
    with pytest.raises(DheadsError, match=r"with optimisation\.learning_rate = 0\.001, but now it is 0\.5"):
        fresh(override(config, {"optimisation": {"learning_rate": 0.5}}), parts=2).resume(tmp_path / "state.pt")


def test_a_large_state_is_saved_in_files_of_a_limited_size(
    saved: tuple[Path, TrainingState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, most = tmp_path / "state.pt", 500_000
    monkeypatch.setattr(module, "_FILE_BYTES", most)
    monkeypatch.setattr(module, "_FILES", 100)
    saved[1].save(path)
    written = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert len(written) >= 4
    assert set(written) == {"state.pt", *(f"state-0000004-{number}.pt" for number in range(1, len(written)))}
    assert max(written.values()) < 1.2 * most, "including what the format adds to each tensor"
    other = fresh(parts=2)
    other.resume(path)
    assert same(tensors(other), tensors(saved[1]))
    # The next state replaces all of them.
    take(other)
    other.save(path)
    assert {file.name for file in tmp_path.iterdir()} == {name.replace("0000004", "0000005") for name in written}
    (tmp_path / "state-0000005-2.pt").unlink()
    with pytest.raises(DheadsError, match=r"state\.pt: cannot be read; .*'state-0000005-2\.pt' is missing"):
        fresh(parts=2).resume(path)


def test_a_state_reads_only_its_own_files(saved: tuple[Path, TrainingState], tmp_path: Path) -> None:
    state = torch.load(saved[0], weights_only=True)
    for name in ("../elsewhere.pt", "/etc/passwd", "weights.safetensors", 3):
        torch.save(state | {"other_files": [name]}, tmp_path / "state.pt")
        with pytest.raises(DheadsError, match=r"state\.pt: cannot be read; delete it to start again .*is missing"):
            fresh(parts=2).resume(tmp_path / "state.pt")


def test_small_keeps_its_state_in_files_under_16_mib(tmp_path: Path) -> None:
    """Which mail servers and repositories accept."""
    config = preset("small")
    state = TrainingState(ExtendedUNet(config), config)
    for parameter in state.unet.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.advance(1.0, 1.0, 0.0)
    state.save(tmp_path / "state.pt")
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) <= 9
    assert max(sizes) < 16 * 2**20
    assert sum(sizes) > 16 * sum(parameter.numel() for parameter in state.unet.parameters()), "nothing is left out"


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "list", "lacking", "strange"])
def test_a_damaged_state_is_refused(saved: tuple[Path, TrainingState], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "state.pt"
    whole = saved[0].read_bytes()
    if kind == "list":
        torch.save([1, 2], path)
    elif kind == "lacking":
        torch.save({"config": "{"}, path)
    elif kind == "strange":
        torch.save({"config": '{"network": {"layers": 3}}'}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"no state at all", "cut": whole[: len(whole) // 2]}[kind])
    with pytest.raises(DheadsError, match=r"state\.pt: cannot be read; delete it to start again"):
        fresh().resume(path)


def test_a_state_that_cannot_be_written_leaves_the_old_one(
    saved: tuple[Path, TrainingState],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file_limit: Callable[[int], None],
) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(b"the old one")
    file_limit(100_000)
    for most in (module._FILE_BYTES, 70_000):  # one file, and several of which the first ones fit
        monkeypatch.setattr(module, "_FILE_BYTES", most)
        monkeypatch.setattr(module, "_FILES", 100)
        with pytest.raises(DheadsError, match=r"cannot write the training state .*state\.pt"):
            saved[1].save(path)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DheadsError, match=r"cannot write the training state"):
        saved[1].save(tmp_path / "absent" / "state.pt")


@pytest.fixture
def file_limit() -> Any:
    """Sets the largest file size, in bytes, until the test ends: writing more fails as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- Weights that training starts from


def test_training_cannot_start_from_weights_of_another_network() -> None:
    ours = override(TINY, {"network": {"model_channels": 32, "dropout": 0.3}})
    assert differences(ours, TINY) == {"network.model_channels": (32, 16), "network.dropout": (0.3, 0.0)}
    message = "w: was trained with network.model_channels = 16, but the configuration has 32; choose the preset"
    with pytest.raises(DheadsError, match=message):
        check_start(ours, TINY, "w")
    for change in ({"diffusion": {"prediction": "eps"}}, {"alignment": {"eye_y": 0.5}}):
        with pytest.raises(DheadsError):
            check_start(override(TINY, change), TINY, "w")


def test_training_can_start_from_weights_of_another_training() -> None:
    changes = {"optimisation": {"learning_rate": 1.0}, "sampling": {"steps": 1}, "network": {"dropout": 0.5}}
    check_start(override(TINY, changes, {"name": "mine"}), TINY, "w")


def test_what_gates_mean_may_change_in_one_direction_only() -> None:
    """Weights with copy gates can be trained on to move the photo; others lack gates, or have one input too many."""
    warp = {"copying": {"gates": False}, "warp": {"flow": True}, "codes": {"pose": {"context": 0}}}
    moving, plain = (override(TINY, {"extensions": change}) for change in (warp, {"copying": {"gates": False}}))
    check_start(moving, TINY, "w")
    check_start(override(moving, {"extensions": {"codes": {"pose": {"noise": 0.1}}}}), moving, "w")
    for ours, theirs in ((plain, TINY), (TINY, plain), (moving, plain), (TINY, moving), (plain, moving)):
        with pytest.raises(DheadsError, match=r"w: was trained with extensions\.(copying\.gates|warp\.flow)"):
            check_start(ours, theirs, "w")
