"""The losses against closed forms and against numbers of the released code."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dheads import diffusion, losses

SHAPE = (4, 3, 8, 8)


@pytest.fixture(scope="module")
def schedule() -> diffusion.Schedule:
    return diffusion.cosine_schedule()


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(shared / "golden" / "official_unet_and_diffusion.safetensors")
    return {name.removeprefix("diffusion."): value for name, value in tensors.items() if name.startswith("diffusion.")}


@pytest.fixture(scope="module")
def released_schedule(schedule: diffusion.Schedule, golden: dict[str, torch.Tensor]) -> diffusion.Schedule:
    """The tables as the released code makes them: in float32, at t = 0 off by 5e-4 of 1 - alpha_bar."""
    ab, beta = golden["alpha_bar_1000"], golden["beta_1000"]
    ab_prev = torch.cat([torch.ones(1), ab[:-1]])
    posterior_var = beta * (1 - ab_prev) / (1 - ab)
    return dataclasses.replace(
        schedule,
        beta=beta,
        alpha_bar=ab,
        alpha_bar_prev=ab_prev,
        posterior_mean_x_0=ab_prev.sqrt() * beta / (1 - ab),
        posterior_mean_x_t=(1 - beta).sqrt() * (1 - ab_prev) / (1 - ab),
        posterior_var=posterior_var,
        posterior_log_var=torch.cat([posterior_var[1:2], posterior_var[1:]]).log(),
    )


def test_simple() -> None:
    target, output = torch.zeros(SHAPE), torch.zeros(SHAPE)
    output[1] = 2
    output[2, 0, 0, 0] = 3
    torch.testing.assert_close(losses.simple(target, output), torch.tensor([0, 4, 9 / 192, 0]))


def test_vlb_is_zero_for_the_posterior_itself(schedule: diffusion.Schedule) -> None:
    x_0, x_t = torch.rand(SHAPE) * 2 - 1, torch.randn(SHAPE)
    t = torch.tensor([1, 20, 300, 999])
    value = losses.vlb(schedule, x_0, x_t, t, x_0, -torch.ones(SHAPE))
    torch.testing.assert_close(value, torch.zeros(4), rtol=0, atol=1e-6)


def test_vlb_is_the_divergence_of_gaussians(schedule: diffusion.Schedule) -> None:
    x_0, x_0_pred, x_t = (torch.rand(SHAPE) * 2 - 1 for _ in range(3))
    var_frac = torch.rand(SHAPE) * 2 - 1
    t = torch.tensor([2, 20, 300, 900])
    true_mean, true_log_var = diffusion.q_posterior(schedule, x_0, x_t, t)
    mean, log_var = diffusion.p_mean_log_var(schedule, x_0_pred, x_t, t, var_frac)
    true, predicted = (
        torch.distributions.Normal(m.double(), (v.double() / 2).exp().expand(SHAPE))
        for m, v in ((true_mean, true_log_var), (mean, log_var))
    )
    nats = torch.distributions.kl_divergence(true, predicted).mean((1, 2, 3))
    value = losses.vlb(schedule, x_0, x_t, t, x_0_pred, var_frac)
    torch.testing.assert_close(value, (nats / math.log(2)).float(), rtol=1e-4, atol=1e-6)


def test_decoder_probabilities_of_all_256_values_sum_to_one() -> None:
    levels = torch.arange(256) / 127.5 - 1
    for mean, std in ((0.3, 0.05), (-1.0, 0.01), (0.99, 0.5)):
        log_var = torch.tensor(2 * math.log(std))
        probability = torch.exp(-losses._decoder_nll(levels, torch.tensor(mean), log_var))
        assert probability.sum().item() == pytest.approx(1, abs=1e-5)
        assert levels[probability.argmax()].item() == pytest.approx(mean, abs=1 / 255 if std < 0.1 else 1.0)


def test_vlb_trains_the_variance_and_not_the_mean(schedule: diffusion.Schedule) -> None:
    x_0, x_t = torch.rand(SHAPE) - 0.5, torch.randn(SHAPE)
    x_0_pred = (torch.rand(SHAPE) - 0.5).requires_grad_()
    var_frac = torch.zeros(SHAPE, requires_grad=True)
    losses.vlb(schedule, x_0, x_t, torch.tensor([0, 1, 300, 999]), x_0_pred, var_frac).sum().backward()
    assert x_0_pred.grad is None
    assert (var_frac.grad.flatten(1).abs().sum(1) > 0).all()


def test_lip_is_the_mean_inside_the_half_open_box() -> None:
    error = torch.rand(SHAPE)
    boxes = torch.tensor([[0, 0, 8, 8], [2, 3, 5, 4], [-3, -2, 2, 20], [4, 4, 4, 6]])
    value = losses.inside(error, boxes)
    expected = [error[0].mean(), error[1, :, 3:4, 2:5].mean(), error[2, :, :, :2].mean(), torch.tensor(0.0)]
    torch.testing.assert_close(value, torch.stack(expected))


def test_total_is_a_new_tensor() -> None:
    parts = [torch.rand(4) for _ in range(3)]
    before = [part.clone() for part in parts]
    value = losses.total(*parts, lambda_vlb=1e-4, lambda_lip=0.2)
    torch.testing.assert_close(value, before[0] + 1e-4 * before[1] + 0.2 * before[2])
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))


def test_snr_weight_turns_x_0_errors_into_v_errors(schedule: diffusion.Schedule) -> None:
    t = torch.tensor([100, 300, 600, 990])
    x_0, eps, v_pred = (torch.randn(SHAPE) for _ in range(3))
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    v_loss = losses.simple(diffusion.v_target(schedule, x_0, eps, t), v_pred)
    x_0_loss = losses.simple(x_0, diffusion.x_0_from(schedule, x_t, t, v_pred, "v"))
    torch.testing.assert_close(losses.snr_weight(schedule, t, 1e9) * x_0_loss, v_loss, rtol=1e-4, atol=0)
    snr = schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])
    torch.testing.assert_close(losses.snr_weight(schedule, t, 4.0), (snr + 1).clamp(max=4).float())


def test_released_means_variances_and_vlb(
    released_schedule: diffusion.Schedule, golden: dict[str, torch.Tensor]
) -> None:
    noise, var_frac = golden["model_output"].chunk(2, dim=1)
    x_0, x_t, t = golden["x_0"], golden["x_t"], golden["t"]
    x_0_pred = diffusion.x_0_from(released_schedule, x_t, t, noise, "eps")
    mean, log_var = diffusion.p_mean_log_var(released_schedule, x_0_pred, x_t, t, var_frac)
    torch.testing.assert_close(mean, golden["p_mean"], rtol=0, atol=1e-4)
    torch.testing.assert_close(log_var, golden["p_log_var"], rtol=0, atol=1e-4)
    value = losses.vlb(released_schedule, x_0, x_t, t, x_0_pred, var_frac)
    torch.testing.assert_close(value, golden["vlb"], rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(value, golden["vlb"], rtol=0, atol=1e-4)


def test_released_numbers_by_our_own_tables(schedule: diffusion.Schedule, golden: dict[str, torch.Tensor]) -> None:
    noise, var_frac = golden["model_output"].chunk(2, dim=1)
    x_0, x_t, t = golden["x_0"], golden["x_t"], golden["t"]
    x_0_pred = diffusion.x_0_from(schedule, x_t, t, noise, "eps")
    mean, log_var = diffusion.p_mean_log_var(schedule, x_0_pred, x_t, t, var_frac)
    torch.testing.assert_close(mean, golden["p_mean"], rtol=0, atol=1e-3)
    torch.testing.assert_close(log_var, golden["p_log_var"], rtol=0, atol=1e-3)
    value = losses.vlb(schedule, x_0, x_t, t, x_0_pred, var_frac)
    torch.testing.assert_close(value, golden["vlb"], rtol=1e-2, atol=1e-7)


def test_released_lip(golden: dict[str, torch.Tensor]) -> None:
    noise = golden["model_output"][:, :3]
    landmarks = golden["mouth_landmarks_xy"]
    # The released crop: 5 px around the landmarks, whole pixels outwards.
    boxes = torch.cat([(landmarks.amin(1) - 5).floor(), (landmarks.amax(1) + 5).ceil()], dim=1)
    value = losses.inside((noise - golden["eps"]).square(), boxes).mean()
    torch.testing.assert_close(value, golden["lip"], rtol=0, atol=1e-7)
