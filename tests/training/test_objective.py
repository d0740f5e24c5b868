"""What training minimises: closed forms of the loss, where its randomness comes from, and what conditioning adds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from real_data import Prepared
from torch import Tensor

from dheads.conditioning import Condition
from dheads.config import Config, override, preset
from dheads.dataset.dataset import Dataset
from dheads.denoiser import Denoiser
from dheads.diffusion import Denoised, v_target
from dheads.extensions.motion import drift
from dheads.extensions.network import ExtendedUNet
from dheads.model import Output
from dheads.training.augment import drop_patches
from dheads.training.batches import Batch, Batches
from dheads.training.objective import TALLIED, tally, training_condition, training_loss

pytest_plugins = "real_data"

TINY = preset("tiny")


@pytest.fixture(scope="module")
def batch(prepared: Prepared) -> Batch:
    dataset = Dataset(prepared.data)
    return Batches(dataset, dataset.split("train"), override(TINY, {"training": {"batch_size": 16}})).batch(0, 0)


def lively(config: Config) -> ExtendedUNet:
    """A network whose output depends on everything: a fresh one says zero."""
    unet = ExtendedUNet(config)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return unet


class Spy(Denoiser):
    """Keeps what the network was given."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Denoised, Output]:
        self.x_t, self.t = x_t, t
        return super().__call__(x_t, t, condition)

    def eps(self, x_0: Tensor) -> Tensor:
        # x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps
        ab = self.schedule.alpha_bar[self.t].float()[:, None, None, None]
        return (self.x_t - ab.sqrt() * x_0) / (1 - ab).sqrt()


# --- The loss


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_a_network_that_says_zero_has_the_loss_of_zero(batch: Batch, prediction: str) -> None:
    """The paper's loss: the squared error of eps (or v, x_0), its mean in the mouth box, and their weighted sum."""
    config = override(TINY, {"diffusion": {"prediction": prediction}, "model": {"copy_gates": False}})
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, snr_clip=None, lambda_lip=0.2, lambda_eye=0.5)
    )
    denoiser = Spy(ExtendedUNet(config).eval())
    terms = training_loss(denoiser, batch, config, 3)
    eps = denoiser.eps(batch.target)
    targets = {"eps": eps, "v": v_target(denoiser.schedule, batch.target, eps, denoiser.t), "x_0": batch.target}
    error = targets[prediction].square()
    torch.testing.assert_close(terms["simple"], error.mean((1, 2, 3)), rtol=1e-3, atol=1e-5)
    for i, (x0, y0, x1, y1) in enumerate(batch.mouth_box.int().tolist()):
        torch.testing.assert_close(terms["lip"][i], error[i, :, y0:y1, x0:x1].mean(), rtol=1e-2, atol=1e-4)
    eyes = torch.stack(
        [error[i, :, y0:y1, x0:x1].mean() for i, (x0, y0, x1, y1) in enumerate(batch.eye_box.int().tolist())]
    )
    torch.testing.assert_close(terms["loss"], terms["simple"] + 0.2 * terms["lip"] + 0.5 * eyes, rtol=1e-2, atol=1e-4)
    assert torch.equal(terms["vlb"], torch.zeros(16))
    assert torch.equal(terms["t"], denoiser.t)


def test_the_noise_is_standard_normal_and_the_times_are_spread(batch: Batch) -> None:
    denoiser = Spy(ExtendedUNet(TINY).eval())
    training_loss(denoiser, batch, TINY, 3)
    late = denoiser.t > 100  # before, rounding hides the noise
    eps = denoiser.eps(batch.target)[late]
    assert float(eps.mean()) == pytest.approx(0, abs=0.02)
    assert float(eps.std()) == pytest.approx(1, abs=0.02)
    assert denoiser.t.min() < 250
    assert denoiser.t.max() > 750


def test_the_x_0_loss_without_its_clip_is_the_v_loss(batch: Batch) -> None:
    """|v - v'|^2 = (snr + 1) |x_0 - x_0'|^2."""
    base = override(TINY, {"model": {"copy_gates": False}, "diffusion": {"prediction": "v"}})
    unet = ExtendedUNet(base).eval()
    torch.nn.init.normal_(unet.out_conv.weight, std=0.1)
    losses = []
    for clip in (None, 1e12):
        config = dataclasses.replace(base, training=dataclasses.replace(base.training, snr_clip=clip))
        losses.append(training_loss(Denoiser(unet), batch, config, 3)["loss"])
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=1e-4)


def test_the_hybrid_loss_has_its_three_terms(batch: Batch) -> None:
    config = override(
        TINY,
        {"model": {"learned_variance": True}, "training": {"lambda_vlb": 0.25, "lambda_lip": 0.5, "lambda_eye": 0.0}},
    )
    terms = training_loss(Denoiser(ExtendedUNet(config).eval()), batch, config, 3)
    assert (terms["vlb"] > 0).all()
    torch.testing.assert_close(terms["loss"], terms["simple"] + 0.25 * terms["vlb"] + 0.5 * terms["lip"])


def test_the_loss_is_a_function_of_seed_step_and_part(batch: Batch) -> None:
    """Dropout too."""
    config = override(TINY, {"model": {"dropout": 0.5}})
    denoiser = Denoiser(lively(config).train())
    first = training_loss(denoiser, batch, config, 3)["loss"]
    torch.manual_seed(99)
    assert torch.equal(training_loss(denoiser, batch, config, 3)["loss"], first)
    another = override(config, {"training": {"seed": 1}})
    for other in (
        training_loss(denoiser, batch, config, 4),
        training_loss(denoiser, batch, config, 3, part=1),
        training_loss(denoiser, batch, another, 3),
    ):
        assert not torch.isclose(other["loss"], first).any()


def test_half_precision_is_near_full(batch: Batch) -> None:
    unet = lively(TINY).eval()
    with torch.no_grad():
        full, half = (training_loss(Denoiser(unet, kind), batch, TINY, 3)["simple"] for kind in ("fp32", "bf16"))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.01)
    assert not torch.equal(half, full)


def test_checkpointed_activations_give_the_same_gradient(batch: Batch) -> None:
    """With dropout and attention, and without keeping what is inside the layers."""
    base = override(TINY, {"model": {"dropout": 0.3, "attn_resolutions": [16]}})
    start = lively(base).state_dict()
    gradients, kept = [], []
    for checkpointed in (False, True):
        config = override(base, {"training": {"checkpoint_activations": checkpointed}})
        unet = ExtendedUNet(config).train()
        unet.load_state_dict(start)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            loss = training_loss(Denoiser(unet), batch, config, 3)["loss"].mean()
        kept.append(sum(sizes))
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in unet.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert kept[1] < 0.3 * kept[0]


# --- What is told of it


def test_the_tally_sums_and_counts(batch: Batch) -> None:
    terms = training_loss(Denoiser(ExtendedUNet(TINY).eval()), batch, TINY, 3)
    table = tally(terms, TINY.diffusion.num_steps)
    assert not table.requires_grad
    assert table.shape == (len(TALLIED), 2)
    for name, (total, count) in zip(TALLIED[:5], table[:5], strict=True):
        torch.testing.assert_close(total, terms[name].detach().sum())
        assert count == 16
    for quarter, (total, count) in enumerate(table[5:]):
        inside = (terms["t"] >= 250 * quarter) & (terms["t"] < 250 * (quarter + 1))
        torch.testing.assert_close(total, terms["simple"].detach()[inside].sum())
        assert count == inside.sum()
    assert table[5:, 1].sum() == 16


# --- The conditioning of training


def condition(batch: Batch, **changes: dict[str, object]) -> tuple[ExtendedUNet, Condition]:
    true = {"motion_drift": 0.0, "patch_drop": 0.0}
    config = override(TINY, {"conditioning": {"hide_motion_mouth": False}, "training": true}, changes)
    unet = ExtendedUNet(config)
    if unet.lip_predictor is not None:
        unet.lip_predictor.mean.fill_(0.1)
        unet.lip_predictor.std.fill_(0.05)
    return unet, training_condition(unet, batch, config, torch.Generator().manual_seed(0))


def test_sound_is_taken_away_at_times(batch: Batch) -> None:
    """For whole examples, and the lip code with it: just what guidance compares with."""
    batch = dataclasses.replace(batch, audio_window=batch.audio_window + 1)  # photos have none to begin with
    _, always = condition(batch, training={"audio_dropout": 0.0})
    assert torch.equal(always.audio_window, batch.audio_window)
    _, never = condition(batch, training={"audio_dropout": 1.0})
    assert torch.equal(never.audio_window, torch.zeros_like(batch.audio_window))
    _, half = condition(batch, training={"audio_dropout": 0.5})
    heard = (half.audio_window == batch.audio_window).all((1, 2))
    silent = (half.audio_window == 0).all((1, 2))
    assert (heard ^ silent).all()
    assert 3 <= heard.sum() <= 13
    assert torch.equal((half.lip_window != 0).any(2).any(1), heard)
    null = always.without_audio()
    assert torch.equal(half.audio_window[silent], null.audio_window[silent])
    assert torch.equal(half.lip_window[silent], null.lip_window[silent])


def test_a_photo_has_neither_sound_nor_lip_code(batch: Batch) -> None:
    audio = torch.ones_like(batch.audio_window)
    audio[:5] = 0
    _, given = condition(dataclasses.replace(batch, audio_window=audio), training={"audio_dropout": 0.0})
    assert (given.lip_window[:5] == 0).all()
    assert (given.lip_window[5:].abs().amax((1, 2)) > 0).all()


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


def test_some_examples_motion_frames_have_holes(batch: Batch) -> None:
    _, given = condition(batch, conditioning={"motion_noise": 0.0}, training={"patch_drop": 0.5})
    assert torch.equal(given.motion_frames, drop_patches(batch.motion_frames, 0.5, torch.Generator().manual_seed(0)))
    whole = (given.motion_frames == batch.motion_frames).flatten(1).all(1)
    assert 3 <= whole.sum() <= 13
    assert torch.equal(given.identity, batch.identity)


def test_lip_codes_are_normalised_then_noised(batch: Batch) -> None:
    batch = dataclasses.replace(batch, audio_window=batch.audio_window + 1)  # photos have no code
    _, exact = condition(batch, training={"lip_noise": 0.0, "audio_dropout": 0.0})
    torch.testing.assert_close(exact.lip_window, (batch.lip_window - 0.1) / 0.05)
    _, noised = condition(batch, training={"lip_noise": 0.2, "audio_dropout": 0.0})
    noise = noised.lip_window - exact.lip_window
    assert float(noise.std()) == pytest.approx(0.2, rel=0.15)
    unet, without = condition(batch, conditioning={"lip_dims": 0})
    assert unet.lip_predictor is without.lip_window is None
