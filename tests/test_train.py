"""`dheads train` on real clips with the tiny preset: what it writes, that it learns, and that it resumes exactly."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from real_data import Prepared, decoded, dheads, sound_seconds
from torch import Tensor
from typer.testing import Result

from dheads import lips
from dheads import train as verb
from dheads.augment import drift
from dheads.config import Config, from_dict, override, preset
from dheads.data import Batch, Dataset, draw_batch
from dheads.denoiser import Denoiser
from dheads.diffusion import v_target
from dheads.errors import DheadsError
from dheads.model import UNet
from dheads.train import TrainingState, learning_rate, training_condition, training_loss
from dheads.weights import load_checkpoint, load_model

pytest_plugins = "real_data"

TINY = preset("tiny")
# Six steps that use every source of randomness, dropout too.
SHORT = {
    "training.steps": 6,
    "training.log_every": 2,
    "training.checkpoint_every": 3,
    "training.sample_every": 6,
    "model.dropout": 0.1,
}


@pytest.fixture(autouse=True, scope="module")
def quick_lip_fit() -> object:
    """One penalty and one fold in place of several: a large system of equations is solved for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lips, "_RIDGES", (1.0,))
        patch.setattr(lips, "_FOLDS", 1)
        yield


def train_command(data: Path, run: Path, changes: dict[str, object], *options: object) -> Result:
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    return dheads("train", "--data", data, "--out", run, "--preset", "tiny", "--device", "cpu", *sets, *options)


@dataclasses.dataclass
class Run:
    path: Path
    done: Result


@pytest.fixture(scope="module")
def short(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory, quick_lip_fit: object) -> Run:
    path = tmp_path_factory.mktemp("train") / "run"
    return Run(path, train_command(prepared.data, path, SHORT))


@pytest.fixture(scope="module")
def dataset(prepared: Prepared) -> Dataset:
    return Dataset(prepared.data)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- What a run writes


def test_the_command_prints_the_checkpoint(short: Run) -> None:
    assert short.done.exit_code == 0, short.done.stderr
    assert short.done.stdout == f"{short.path / 'weights.safetensors'}\n"
    assert "train: 100%" in short.done.stderr
    names = {path.name for path in short.path.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "sample-0000006.mp4", "state.pt", "weights.safetensors"}


def test_metrics(short: Run) -> None:
    rows = metrics(short.path)
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert set(row) == {"step", "lr", "loss", "simple", "vlb", "lip", "grad_norm", "val_simple", "val_lip"}
        assert all(math.isfinite(value) for value in row.values())
        assert row["loss"] == pytest.approx(row["simple"] + TINY.training.lambda_lip * row["lip"], rel=1e-4)
        assert row["vlb"] == 0, "the tiny network has no learned variance"
    config = override(TINY, {"training": {"steps": 6}})
    assert [row["lr"] for row in rows] == pytest.approx([learning_rate(config, step) for step in (2, 4, 6)], rel=1e-5)


def test_the_sample_video_shows_the_held_out_clip(short: Run, dataset: Dataset) -> None:
    """20 frames, the sampled face on the left, the truth on the right, with the sound."""
    frames = decoded(short.path / "sample-0000006.mp4")
    assert frames.shape == (20, 32, 64, 3)
    (clip,) = dataset.split("val")
    assert abs(frames[:, :, 32:].astype(float) - dataset.frames(clip)).mean() < 6
    assert sound_seconds(short.path / "sample-0000006.mp4") == pytest.approx(20 / 25, abs=0.02)


def test_the_checkpoint_is_complete(short: Run, dataset: Dataset) -> None:
    unet, config, info = load_model(str(short.path / "weights.safetensors"))
    assert from_dict(json.loads((short.path / "config.json").read_text(encoding="utf-8"))) == config
    assert config.name == "tiny"
    assert config.model.dropout == 0.1
    assert info["training"] == {"steps": 6, "examples": 24, "clips": 5}
    codes = unet.lips.predict(dataset.talks("train")[0].speech)
    assert codes.std(0).min() > 0.1, "the lip predictor was fitted and travels with the weights"


def test_the_checkpoint_holds_the_average_and_the_state_both(short: Run) -> None:
    weights = load_checkpoint(short.path / "weights.safetensors").tensors
    state = torch.load(short.path / "state.pt", weights_only=True)
    assert state["step"] == 6
    assert same_tensors(weights, state["ema"])
    assert not torch.equal(state["unet"]["stem.weight"], state["ema"]["stem.weight"])


# --- Resume


def test_an_interrupted_run_goes_on_exactly_where_it_was(
    prepared: Prepared, short: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(dataset: Dataset, clips: list, config: Config, step: int) -> Batch:
        if step == 4:
            raise KeyboardInterrupt
        return draw_batch(dataset, clips, config, step)

    with monkeypatch.context() as patch:
        patch.setattr(verb, "draw_batch", interrupted)
        done = train_command(prepared.data, tmp_path, SHORT)
    assert done.exit_code == 130
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3
    assert load_checkpoint(tmp_path / "weights.safetensors").info["training"]["steps"] == 3

    torch.manual_seed(77)  # whatever else was drawn in this process
    done = train_command(prepared.data, tmp_path, SHORT, "--quiet")
    assert (done.exit_code, done.stderr) == (0, "")
    ours, theirs = (torch.load(run / "state.pt", weights_only=True) for run in (tmp_path, short.path))
    assert ours["step"] == theirs["step"] == 6
    assert same_tensors(ours["unet"], theirs["unet"])
    assert same_tensors(ours["ema"], theirs["ema"])
    for mine, other in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True):
        assert same_tensors(mine, other)
    last, wanted = metrics(tmp_path)[-1], metrics(short.path)[-1]
    assert (last["val_simple"], last["val_lip"]) == (wanted["val_simple"], wanted["val_lip"])
    assert (tmp_path / "sample-0000006.mp4").read_bytes() == (short.path / "sample-0000006.mp4").read_bytes()


def test_a_finished_run_is_left_as_it_is(prepared: Prepared, short: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(short.path, run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    done = train_command(prepared.data, run, SHORT, "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{run / 'weights.safetensors'}\n", "")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_run_of_another_configuration_is_refused(prepared: Prepared, short: Run) -> None:
    before = {path.name: path.read_bytes() for path in short.path.iterdir()}
    done = train_command(prepared.data, short.path, SHORT | {"training.learning_rate": 0.5})
    assert done.exit_code == 1
    assert done.stdout == ""
    message = "belongs to another configuration; choose another --out or that configuration"
    assert done.stderr == f"error: {short.path / 'state.pt'}: {message}\n"
    assert {path.name: path.read_bytes() for path in short.path.iterdir()} == before


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "list", "lacking"])
def test_a_damaged_state_is_refused(short: Run, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "state.pt"
    whole = (short.path / "state.pt").read_bytes()
    if kind == "list":
        torch.save([1, 2], path)
    elif kind == "lacking":
        torch.save({"config": "{"}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"no state at all", "cut": whole[: len(whole) // 2]}[kind])
    state = TrainingState(UNet(TINY), TINY)
    with pytest.raises(DheadsError, match=r"state\.pt: cannot be read; delete it to start anew"):
        state.resume(path)


# --- What cannot be trained


def test_a_dataset_of_another_preset_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    done = dheads("train", "--data", prepared.data, "--out", tmp_path / "run", "--preset", "small", "--device", "cpu")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {prepared.data}: prepared with size = 32, but the configuration wants 96; ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_dataset_with_nothing_to_train_on_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("dataset.toml", "clips.csv"):
        text = (prepared.data / name).read_text(encoding="utf-8")
        (data / name).write_text(text.replace(",train,", ",test,"), encoding="utf-8")
    with pytest.raises(DheadsError, match="has no clip in its train split"):
        verb.train(TINY, data, tmp_path / "run")


def test_photos_alone_teach_no_lip_code(prepared: Prepared, tmp_path: Path) -> None:
    """But a network without it can be trained on them."""
    data = tmp_path / "data"
    shutil.copytree(prepared.data, data)
    lines = (data / "clips.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    photos = "".join(line for line in lines if line.startswith(("clip,", "still_")))
    (data / "clips.csv").write_text(photos, encoding="utf-8")
    with pytest.raises(DheadsError, match=r"has no video to train on, which the lip code needs; set conditioning"):
        verb.train(TINY, data, tmp_path / "run", progress=False)
    changes = {"conditioning.lip_dims": 0, "training.steps": 2}
    done = train_command(data, tmp_path / "plain", changes, "--quiet")
    assert (done.exit_code, done.stderr) == (0, "")
    assert len(decoded(tmp_path / "plain" / "sample-0000002.mp4")) == 1


def test_an_output_that_is_a_file_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DheadsError, match=r"cannot make the folder .*file"):
        verb.train(TINY, prepared.data, tmp_path / "file", progress=False)


def test_a_loss_that_is_not_finite_ends_the_run(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a sentence that names the clips, and before the weights are spoilt."""

    def broken(denoiser: Denoiser, batch: Batch, config: Config, step: int) -> dict[str, Tensor]:
        terms = training_loss(denoiser, batch, config, step)
        return {name: value * (math.nan if step == 2 else 1) for name, value in terms.items()}

    monkeypatch.setattr(verb, "training_loss", broken)
    changes = {"training.steps": 4, "training.checkpoint_every": 1, "conditioning.lip_dims": 0}
    done = train_command(prepared.data, tmp_path / "run", changes, "--quiet")
    assert done.exit_code == 1
    assert "the loss or its gradient is not finite at step 2 (clips " in done.stderr
    weights = load_checkpoint(tmp_path / "run" / "weights.safetensors")
    assert weights.info["training"]["steps"] == 2
    assert all(tensor.isfinite().all() for tensor in weights.tensors.values())


# --- Starting from weights


def test_training_starts_from_given_weights(prepared: Prepared, short: Run, tmp_path: Path) -> None:
    start = short.path / "weights.safetensors"
    changes = {**SHORT, "training.steps": 1, "training.learning_rate": 0.0}
    done = train_command(prepared.data, tmp_path, changes, "--init", start, "--quiet")
    assert done.exit_code == 0, done.stderr
    assert same_tensors(load_checkpoint(tmp_path / "weights.safetensors").tensors, load_checkpoint(start).tensors)


def test_weights_of_another_network_are_refused(prepared: Prepared, short: Run, tmp_path: Path) -> None:
    start = short.path / "weights.safetensors"
    done = train_command(prepared.data, tmp_path / "run", {"model.model_channels": 32}, "--init", start, "--quiet")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {start}: its weights are of another network")
    assert done.stderr.count("\n") == 1


# --- The steps themselves


def quiet_config(**training: object) -> Config:
    """Without what only randomises training."""
    off = {"augment": False, "audio_dropout": 0.0, "lip_noise": 0.0, "still_share": 0.0, "motion_drift": 0.0}
    return override(TINY, {"conditioning": {"lip_dims": 0, "motion_noise": 0.0}, "training": off | training})


def test_the_loss_falls_on_a_few_clips(dataset: Dataset) -> None:
    """60 steps on one clip: the network learns to copy what stands still and to fill in the mouth."""
    config = quiet_config(steps=60, batch_size=4, learning_rate=2e-3)
    clips = [clip for clip in dataset.clips if clip.clip == "s1/grid_one"]
    torch.manual_seed(0)
    state = TrainingState(UNet(config), config)
    denoiser = Denoiser(state.unet)

    def error() -> float:
        rows = [training_loss(denoiser, draw_batch(dataset, clips, config, k), config, k) for k in range(900, 906)]
        return float(torch.stack([row["simple"] for row in rows]).mean())

    with torch.no_grad():
        before = error()
    for step in range(60):
        loss = training_loss(denoiser, draw_batch(dataset, clips, config, step), config, step)["loss"].mean()
        state.update(loss, learning_rate(config, step))
    with torch.no_grad():
        assert error() < 0.3 * before


def test_the_papers_learning_rate() -> None:
    """Times 0.8 every 1/18 of the steps."""
    config = override(preset("crema"), {"training": {"steps": 1800}})
    for step in (0, 1, 99, 100, 199, 200, 899, 900, 1799):
        assert learning_rate(config, step) == pytest.approx(5e-5 * 0.8 ** (step // 100))


def test_the_cooldown_learning_rate() -> None:
    """A linear warm-up, constant, and in the last 30 % a line to 0 that ends at 2 %."""
    training = {"steps": 1000, "learning_rate": 0.1, "lr_schedule": "cooldown", "warmup_steps": 50}
    config = override(TINY, {"training": training})
    assert [learning_rate(config, step) for step in (0, 24, 49)] == pytest.approx([0.1 / 50, 0.05, 0.1])
    assert [learning_rate(config, step) for step in (50, 400, 700)] == pytest.approx([0.1] * 3)
    assert [learning_rate(config, step) for step in (850, 970, 999)] == pytest.approx([0.05, 0.01, 0.002])


def test_one_update() -> None:
    """The gradient's norm before clipping is told; the average follows with min(decay, (1 + n) / (10 + n))."""
    config = override(TINY, {"training": {"ema_decay": 0.9, "grad_clip": 0.5}})
    unet = UNet(config)
    state = TrainingState(unet, config)
    start = unet.stem.weight.detach().clone()
    for step, decay in ((1, 2 / 11), (2, 3 / 12)):
        old = state.ema.stem.weight.clone()
        norm = state.update(7 * unet.stem.weight.sum(), 1e-2)
        assert norm == pytest.approx(7 * math.sqrt(unet.stem.weight.numel()), rel=1e-4)
        assert state.step == step
        torch.testing.assert_close(state.ema.stem.weight, decay * old + (1 - decay) * unet.stem.weight)
    # Adam's first steps are the learning rate, whatever the gradient's size.
    torch.testing.assert_close(unet.stem.weight, start - 2e-2, rtol=0, atol=1e-5)
    assert not state.ema.training
    assert not any(parameter.requires_grad for parameter in state.ema.parameters())


# --- The loss


@pytest.fixture(scope="module")
def batch(dataset: Dataset) -> Batch:
    return draw_batch(dataset, dataset.split("train"), override(TINY, {"training": {"batch_size": 16}}), 0)


def noise_of(config: Config, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
    """The t and eps that `training_loss` draws."""
    generator = torch.Generator().manual_seed(config.training.seed * 1_000_003 + step)
    t = torch.randint(config.diffusion.num_steps, (len(batch.target),), generator=generator)
    return t, torch.randn(batch.target.shape, generator=generator)


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_a_network_that_says_zero_has_the_loss_of_zero(batch: Batch, prediction: str) -> None:
    """The paper's loss: the squared error of eps (or v, x_0), its mean in the mouth box, and their weighted sum."""
    config = override(TINY, {"diffusion": {"prediction": prediction}, "model": {"copy_gates": False}})
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, snr_clip=None, lambda_lip=0.2))
    denoiser = Denoiser(UNet(config).eval())
    terms = training_loss(denoiser, batch, config, 3)
    t, eps = noise_of(config, batch, 3)
    targets = {"eps": eps, "v": v_target(denoiser.schedule, batch.target, eps, t), "x_0": batch.target}
    error = targets[prediction].square()
    torch.testing.assert_close(terms["simple"], error.mean((1, 2, 3)))
    for i, (x0, y0, x1, y1) in enumerate(batch.mouth_box.int().tolist()):
        torch.testing.assert_close(terms["lip"][i], error[i, :, y0:y1, x0:x1].mean())
    torch.testing.assert_close(terms["loss"], terms["simple"] + 0.2 * terms["lip"])
    assert torch.equal(terms["vlb"], torch.zeros(16))


def test_the_x_0_loss_without_its_clip_is_the_v_loss(batch: Batch) -> None:
    """|v - v'|^2 = (snr + 1) |x_0 - x_0'|^2."""
    base = override(TINY, {"model": {"copy_gates": False}, "diffusion": {"prediction": "v"}})
    unet = UNet(base).eval()
    torch.nn.init.normal_(unet.out_conv.weight, std=0.1)
    losses = []
    for clip in (None, 1e12):
        config = dataclasses.replace(base, training=dataclasses.replace(base.training, snr_clip=clip))
        losses.append(training_loss(Denoiser(unet), batch, config, 3)["loss"])
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=1e-4)


def test_the_hybrid_loss_has_its_three_terms(batch: Batch) -> None:
    config = override(TINY, {"model": {"learned_variance": True}, "training": {"lambda_vlb": 0.25, "lambda_lip": 0.5}})
    terms = training_loss(Denoiser(UNet(config).eval()), batch, config, 3)
    assert (terms["vlb"] > 0).all()
    torch.testing.assert_close(terms["loss"], terms["simple"] + 0.25 * terms["vlb"] + 0.5 * terms["lip"])


def test_the_loss_is_a_function_of_seed_and_step(batch: Batch) -> None:
    config = override(TINY, {"model": {"dropout": 0.5}})
    unet = UNet(config)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    denoiser = Denoiser(unet.train())
    first = training_loss(denoiser, batch, config, 3)["loss"]
    torch.manual_seed(99)
    assert torch.equal(training_loss(denoiser, batch, config, 3)["loss"], first)
    assert not torch.equal(training_loss(denoiser, batch, config, 4)["loss"], first)


def test_half_precision_is_near_full(batch: Batch) -> None:
    unet = UNet(TINY).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        full, half = (training_loss(Denoiser(unet, kind), batch, TINY, 3)["simple"] for kind in ("fp32", "bf16"))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.01)
    assert not torch.equal(half, full)


# --- The conditioning of training


def condition(batch: Batch, **changes: dict[str, object]) -> tuple[UNet, verb.Condition]:
    config = override(TINY, {"conditioning": {"hide_motion_mouth": False}, "training": {"motion_drift": 0.0}})
    config = override(config, changes)
    unet = UNet(config)
    if unet.lips is not None:
        unet.lips.mean.fill_(0.1)
        unet.lips.std.fill_(0.05)
    return unet, training_condition(unet, batch, config, torch.Generator().manual_seed(0))


def test_sound_is_taken_away_at_times(batch: Batch) -> None:
    """For whole examples; the lip code stays."""
    _, always = condition(batch, training={"audio_dropout": 0.0})
    assert torch.equal(always.audio_window, batch.audio_window)
    _, never = condition(batch, training={"audio_dropout": 1.0})
    assert torch.equal(never.audio_window, torch.zeros_like(batch.audio_window))
    _, half = condition(batch, training={"audio_dropout": 0.5})
    heard = (half.audio_window == batch.audio_window).all((1, 2))
    silent = (half.audio_window == 0).all((1, 2))
    assert (heard ^ silent).all()
    assert 3 <= heard.sum() <= 13
    assert half.lip_window.abs().amax((1, 2)).min() > 0


def test_the_told_level_is_that_of_the_noise(batch: Batch) -> None:
    _, given = condition(batch, conditioning={"motion_noise": 0.3})
    noise = given.motion_frames - batch.motion_frames
    level = given.motion_noise
    assert ((level >= 0) & (level <= 0.3)).all()
    assert level.max() > 2 * level.min()
    torch.testing.assert_close(noise.flatten(1).std(1), level, rtol=0.05, atol=1e-4)
    _, clean = condition(batch, conditioning={"motion_noise": 0.0})
    assert torch.equal(clean.motion_frames, batch.motion_frames)
    assert clean.motion_noise is None


def test_motion_frames_drift_before_they_are_noised(batch: Batch) -> None:
    _, clean = condition(batch, conditioning={"motion_noise": 0.0}, training={"motion_drift": 1.0})
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(clean.motion_frames, drift(batch.motion_frames, 1.0, generator))
    assert torch.equal(clean.identity, batch.identity)
    _, noised = condition(batch, conditioning={"motion_noise": 0.3}, training={"motion_drift": 1.0})
    noise = noised.motion_frames - clean.motion_frames
    torch.testing.assert_close(noise.flatten(1).std(1), noised.motion_noise, rtol=0.05, atol=1e-4)


def test_lip_codes_are_normalised_then_noised(batch: Batch) -> None:
    _, exact = condition(batch, training={"lip_noise": 0.0})
    torch.testing.assert_close(exact.lip_window, (batch.lip_window - 0.1) / 0.05)
    _, noised = condition(batch, training={"lip_noise": 0.2})
    noise = noised.lip_window - exact.lip_window
    assert float(noise.std()) == pytest.approx(0.2, rel=0.15)
    unet, without = condition(batch, conditioning={"lip_dims": 0})
    assert unet.lips is without.lip_window is None


def test_validation_asks_the_same_every_time(dataset: Dataset) -> None:
    unet = UNet(TINY).eval()
    first = verb.validate(Denoiser(unet), dataset, dataset.split("val"), TINY)
    torch.manual_seed(3)
    assert verb.validate(Denoiser(unet), dataset, dataset.split("val"), TINY) == first
    assert set(first) == {"val_simple", "val_lip"}
