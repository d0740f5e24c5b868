"""The training loss: closed forms, its randomness, and the condition it is computed with."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from real_data import Prepared
from torch import Tensor

from dheads.conditioning import Condition, Cues
from dheads.config import Config, override, preset
from dheads.dataset.dataset import Dataset
from dheads.denoiser import Denoiser
from dheads.diffusion import Denoised, v_target
from dheads.extensions.guidance import silenced
from dheads.extensions.motion import MotionCondition, drift, punch_holes
from dheads.extensions.network import ExtendedUNet
from dheads.model import Output
from dheads.training.batches import Batch, Batches
from dheads.training.objective import tallied, tally, training_condition, training_loss

pytest_plugins = "real_data"

TINY = preset("tiny")


@pytest.fixture(scope="module")
def batch(prepared: Prepared) -> Batch:
    dataset = Dataset(prepared.data)
    return Batches(dataset, dataset.split("train"), override(TINY, {"optimisation": {"batch_size": 16}})).batch(0, 0)


def lively(config: Config) -> ExtendedUNet:
    """A network whose output depends on all its inputs; that of a new one is zero."""
    unet = ExtendedUNet(config)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return unet


class Spy(Denoiser):
    """Keeps the network's inputs."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Denoised, Output]:
        self.x_t, self.t = x_t, t
        return super().__call__(x_t, t, condition)

    def eps(self, x_0: Tensor) -> Tensor:
        # x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps
        ab = self.schedule.alpha_bar[self.t].float()[:, None, None, None]
        return (self.x_t - ab.sqrt() * x_0) / (1 - ab).sqrt()


# --- The loss


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_a_network_whose_output_is_zero_has_the_loss_of_zero(batch: Batch, prediction: str) -> None:
    """The paper's loss: the squared error of eps (or v, x_0), its mean in the mouth box, and their weighted sum."""
    extensions = {"copying": {"gates": False}, "snr_clip": None, "codes": {"eyes": {"weight": 0.5}}}
    changes = {"diffusion": {"prediction": prediction}, "optimisation": {"lambda_lip": 0.2}, "extensions": extensions}
    config = override(TINY, changes)
    denoiser = Spy(ExtendedUNet(config).eval())
    terms = training_loss(denoiser, batch, config, 3)
    eps = denoiser.eps(batch.target)
    targets = {"eps": eps, "v": v_target(denoiser.schedule, batch.target, eps, denoiser.t), "x_0": batch.target}
    error = targets[prediction].square()
    torch.testing.assert_close(terms["simple"], error.mean((1, 2, 3)), rtol=1e-3, atol=1e-5)
    for i, (x0, y0, x1, y1) in enumerate(batch.mouth_box.int().tolist()):
        torch.testing.assert_close(terms["lip"][i], error[i, :, y0:y1, x0:x1].mean(), rtol=1e-2, atol=1e-4)
    eyes = torch.stack(
        [error[i, :, y0:y1, x0:x1].mean() for i, (x0, y0, x1, y1) in enumerate(batch.code_boxes["eyes"].int().tolist())]
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
    base = override(TINY, {"extensions": {"copying": {"gates": False}}, "diffusion": {"prediction": "v"}})
    unet = ExtendedUNet(base).eval()
    torch.nn.init.normal_(unet.out_conv.weight, std=0.1)
    losses = []
    for clip in (None, 1e12):
        config = override(base, {"extensions": {"snr_clip": clip}})
        losses.append(training_loss(Denoiser(unet), batch, config, 3)["loss"])
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=1e-4)


def test_the_hybrid_loss_has_its_three_terms(batch: Batch) -> None:
    changes = {"network": {"learned_variance": True}, "optimisation": {"lambda_vlb": 0.25, "lambda_lip": 0.5}}
    config = override(TINY, changes, {"extensions": {"codes": {"eyes": {"weight": 0.0}}}})
    terms = training_loss(Denoiser(ExtendedUNet(config).eval()), batch, config, 3)
    assert (terms["vlb"] > 0).all()
    torch.testing.assert_close(terms["loss"], terms["simple"] + 0.25 * terms["vlb"] + 0.5 * terms["lip"])


def test_the_loss_is_a_function_of_seed_step_and_part(batch: Batch) -> None:
    """With dropout."""
    config = override(TINY, {"network": {"dropout": 0.5}})
    denoiser = Denoiser(lively(config).train())
    first = training_loss(denoiser, batch, config, 3)["loss"]
    torch.manual_seed(99)
    assert torch.equal(training_loss(denoiser, batch, config, 3)["loss"], first)
    another = override(config, {"optimisation": {"seed": 1}})
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
    """With dropout and attention, and without keeping the activations inside layers."""
    base = override(TINY, {"network": {"dropout": 0.3, "attn_resolutions": [16]}})
    start = lively(base).state_dict()
    gradients, kept = [], []
    for checkpointed in (False, True):
        config = override(base, {"run": {"checkpoint_activations": checkpointed}})
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


# --- Sums for the log


def test_the_tally_sums_and_counts(batch: Batch) -> None:
    terms = training_loss(Denoiser(ExtendedUNet(TINY).eval()), batch, TINY, 3)
    table, names = tally(terms, TINY), tallied(TINY)
    assert names[:5] == ("loss", "simple", "vlb", "lip", "eyes")
    assert not table.requires_grad
    assert table.shape == (len(names), 2) == (9, 2)
    for name, (total, count) in zip(names[:5], table[:5], strict=True):
        torch.testing.assert_close(total, terms[name].detach().sum())
        assert count == 16
    for quarter, (total, count) in enumerate(table[5:]):
        inside = (terms["t"] >= 250 * quarter) & (terms["t"] < 250 * (quarter + 1))
        torch.testing.assert_close(total, terms["simple"].detach()[inside].sum())
        assert count == inside.sum()
    assert table[5:, 1].sum() == 16


# --- The condition in training


def condition(batch: Batch, **extensions: dict[str, object]) -> tuple[ExtendedUNet, MotionCondition]:
    """Without drift, holes and hidden mouths where these are not set."""
    plain = {"motion": {"drift": 0.0, "holes": 0.0, "hide_mouth": False}}
    config = override(TINY, {"extensions": plain}, {"extensions": extensions})
    unet = ExtendedUNet(config)
    if unet.lip_predictor is not None:
        unet.lip_predictor.mean.fill_(0.1)
        unet.lip_predictor.std.fill_(0.05)
    return unet, training_condition(unet, batch, config, torch.Generator().manual_seed(0))


def with_sound(batch: Batch, audio_window: Tensor) -> Batch:
    return dataclasses.replace(batch, cues=Cues(audio_window, batch.cues.codes))


def test_some_examples_have_no_sound(batch: Batch) -> None:
    """Neither embeddings nor the lip code: the same as the null of guidance."""
    batch = with_sound(batch, batch.cues.audio_window + 1)  # photos have no sound anyway
    sound = batch.cues.audio_window
    _, always = condition(batch, sound={"dropout": 0.0})
    assert torch.equal(always.cues.audio_window, sound)
    _, never = condition(batch, sound={"dropout": 1.0})
    assert torch.equal(never.cues.audio_window, torch.zeros_like(sound))
    _, half = condition(batch, sound={"dropout": 0.5})
    heard = (half.cues.audio_window == sound).all((1, 2))
    silent = (half.cues.audio_window == 0).all((1, 2))
    assert (heard ^ silent).all()
    assert 3 <= heard.sum() <= 13
    assert torch.equal((half.cues.codes["lips"] != 0).any(2).any(1), heard)
    null = silenced(always, torch.zeros(len(sound)))
    assert torch.equal(half.cues.audio_window[silent], null.cues.audio_window[silent])
    assert torch.equal(half.cues.codes["lips"][silent], null.cues.codes["lips"][silent])


def test_a_photo_has_neither_sound_nor_lip_code(batch: Batch) -> None:
    audio = torch.ones_like(batch.cues.audio_window)
    audio[:5] = 0
    _, given = condition(with_sound(batch, audio), sound={"dropout": 0.0})
    assert (given.cues.codes["lips"][:5] == 0).all()
    assert (given.cues.codes["lips"][5:].abs().amax((1, 2)) > 0).all()


def test_the_given_level_is_that_of_the_noise(batch: Batch) -> None:
    _, given = condition(batch, motion={"noise": 0.3})
    noise = given.motion_frames - batch.motion_frames
    level = given.motion_noise
    assert ((level >= 0) & (level <= 0.3)).all()
    assert level.max() > 2 * level.min()
    torch.testing.assert_close(noise.flatten(1).std(1), level, rtol=0.05, atol=1e-4)
    _, clean = condition(batch, motion={"noise": 0.0})
    assert torch.equal(clean.motion_frames, batch.motion_frames)
    assert clean.motion_noise is None


def test_motion_frames_drift_before_they_are_noised(batch: Batch) -> None:
    _, clean = condition(batch, motion={"noise": 0.0, "drift": 1.0})
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(clean.motion_frames, drift(batch.motion_frames, 1.0, generator))
    assert torch.equal(clean.identity, batch.identity)
    _, noised = condition(batch, motion={"noise": 0.3, "drift": 1.0})
    noise = noised.motion_frames - clean.motion_frames
    torch.testing.assert_close(noise.flatten(1).std(1), noised.motion_noise, rtol=0.05, atol=1e-4)


def test_some_examples_motion_frames_have_holes(batch: Batch) -> None:
    _, given = condition(batch, motion={"noise": 0.0, "holes": 0.5})
    assert torch.equal(given.motion_frames, punch_holes(batch.motion_frames, 0.5, torch.Generator().manual_seed(0)))
    whole = (given.motion_frames == batch.motion_frames).flatten(1).all(1)
    assert 3 <= whole.sum() <= 13
    assert torch.equal(given.identity, batch.identity)


def test_lip_codes_are_normalised_then_noised(batch: Batch) -> None:
    batch = with_sound(batch, batch.cues.audio_window + 1)  # a photo has no lip code
    always = {"sound": {"dropout": 0.0}}
    _, exact = condition(batch, codes={"lips": {"noise": 0.0}}, **always)
    torch.testing.assert_close(exact.cues.codes["lips"], (batch.cues.codes["lips"] - 0.1) / 0.05)
    _, noised = condition(batch, codes={"lips": {"noise": 0.2}}, **always)
    noise = noised.cues.codes["lips"] - exact.cues.codes["lips"]
    assert float(noise.std()) == pytest.approx(0.2, rel=0.15)
    unet, without = condition(batch, codes={"lips": None})
    assert unet.lip_predictor is None
    assert "lips" not in without.cues.codes
