"""Schedules, distributions and solvers against closed forms and against numbers of the released code."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dheads import diffusion
from dheads.diffusion import Denoised
from dheads.extensions.detail import UNDRAWN, keep_seen

SHAPE = (4, 3, 6, 6)
MEAN, STD = 0.1, 0.1  # the Gaussian data of the solver tests: the clamp to [-1, 1] never acts


@pytest.fixture(scope="module")
def schedule() -> diffusion.Schedule:
    return diffusion.cosine_schedule()


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(shared / "golden" / "official_unet_and_diffusion.safetensors")
    return {name.removeprefix("diffusion."): value for name, value in tensors.items() if name.startswith("diffusion.")}


def no_noise() -> torch.Tensor:
    raise AssertionError("this solver draws no noise")


def gaussian_denoiser(schedule: diffusion.Schedule) -> diffusion.Denoise:
    """The exact E[x_0 | x_t] of data N(MEAN, STD^2)."""

    def denoise(x_t: torch.Tensor, t: int) -> Denoised:
        ab = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        gain = ab.sqrt() * STD**2 / (ab * STD**2 + 1 - ab)
        return Denoised(MEAN + gain * (x_t - ab.sqrt() * MEAN), None)

    return denoise


def gaussian_flow(schedule: diffusion.Schedule, x_T: torch.Tensor, to: int) -> torch.Tensor:
    """Where the probability-flow ODE leads for that data: a point keeps its distance from the mean, in deviations."""
    ab = schedule.alpha_bar[[-1, to]].tolist()
    mean = [ab_t**0.5 * MEAN for ab_t in ab]
    std = [(ab_t * STD**2 + 1 - ab_t) ** 0.5 for ab_t in ab]
    return mean[1] + std[1] * (x_T - mean[0]) / std[0]


def test_tables(schedule: diffusion.Schedule) -> None:
    assert schedule.num_steps == 1000
    assert all(table.dtype == torch.float64 for table in (schedule.beta, schedule.alpha_bar, schedule.posterior_var))
    assert (schedule.alpha_bar.diff() < 0).all()
    assert ((schedule.beta > 0) & (schedule.beta <= 0.999 + 1e-12)).all()
    # f(t) / f(0) at t = 500, the definition itself.
    time = torch.tensor([500 / 1000, 0.0], dtype=torch.float64)
    half, start = torch.cos((time + 0.008) / 1.008 * torch.pi / 2) ** 2
    torch.testing.assert_close(schedule.alpha_bar[499], half / start, rtol=1e-10, atol=0)
    assert schedule.alpha_bar_prev[0] == 1
    assert schedule.posterior_var[0] == 0
    assert schedule.posterior_log_var[0] == schedule.posterior_log_var[1] == schedule.posterior_var[1].log()


def test_extract(schedule: diffusion.Schedule) -> None:
    values = diffusion.extract(schedule.beta, torch.tensor([3, 999]), torch.zeros(2, 3, 4, 4))
    assert values.shape == (2, 1, 1, 1)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.flatten(), schedule.beta[[3, 999]].float())


def test_one_step_for_all_says_what_each_sample_s_own_says(schedule: diffusion.Schedule) -> None:
    x_0, x_t = torch.rand(2, *SHAPE)
    each = torch.full((SHAPE[0],), 300)
    for name, given in {"q_sample": (x_0, 300, x_t), "eps_from_x_0": (x_t, 300, x_0)}.items():
        many = tuple(each if isinstance(value, int) else value for value in given)
        function = getattr(diffusion, name)
        torch.testing.assert_close(function(schedule, *given), function(schedule, *many))
    one, other = (diffusion.p_mean_log_var(schedule, x_0, x_t, t, x_t) for t in (300, each))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("n", "timesteps"),
    [(1, [999]), (2, [0, 999]), (5, [0, 250, 500, 749, 999]), (8, [0, 143, 285, 428, 571, 714, 856, 999])],
)
def test_respacing(schedule: diffusion.Schedule, n: int, timesteps: list[int]) -> None:
    few = diffusion.respaced(schedule, n)
    assert few.timestep_map.tolist() == timesteps
    assert torch.equal(few.alpha_bar, schedule.alpha_bar[timesteps])
    # The new betas lead to the same noise levels.
    torch.testing.assert_close(torch.cumprod(1 - few.beta, 0), few.alpha_bar, rtol=1e-6, atol=0)
    assert all(torch.isfinite(table).all() for table in vars(few).values())


@pytest.mark.parametrize(
    ("n", "timesteps"), [(1, [999]), (2, [0, 999]), (4, [0, 111, 444, 999]), (6, [0, 40, 160, 360, 639, 999])]
)
def test_quadratic_respacing(schedule: diffusion.Schedule, n: int, timesteps: list[int]) -> None:
    assert diffusion.respaced(schedule, n, "quadratic").timestep_map.tolist() == timesteps


@pytest.mark.parametrize("n", [3, 50, 100, 700, 999, 1000])
def test_quadratic_steps_never_meet(schedule: diffusion.Schedule, n: int) -> None:
    few = diffusion.respaced(schedule, n, "quadratic")
    assert few.timestep_map[[0, -1]].tolist() == [0, 999]
    assert (few.timestep_map.diff() > 0).all()
    assert all(torch.isfinite(table).all() for table in vars(few).values())


def test_respacing_even_in_the_signal_to_noise_ratio(schedule: diffusion.Schedule) -> None:
    few = diffusion.respaced(schedule, 12, "logsnr")
    gaps = torch.logit(few.alpha_bar).diff()
    assert few.timestep_map[[0, -1]].tolist() == [0, 999]
    # The schedule's own last steps are longer than the wanted ones; the others come out even.
    assert gaps[1:-4] / gaps[1:-4].mean() == pytest.approx(torch.ones(6), abs=0.02)


@pytest.mark.parametrize("n", [2, 3, 50, 400, 999, 1000])
def test_steps_even_in_the_signal_to_noise_ratio_never_meet(schedule: diffusion.Schedule, n: int) -> None:
    few = diffusion.respaced(schedule, n, "logsnr")
    assert len(few.timestep_map) == n
    assert few.timestep_map[[0, -1]].tolist() == [0, 999]
    assert (few.timestep_map.diff() > 0).all()
    assert all(torch.isfinite(table).all() for table in vars(few).values())


def test_the_steps_of_least_noise(schedule: diffusion.Schedule) -> None:
    few = diffusion.respaced(schedule, 6)
    short = diffusion.shortened(few, 4)
    assert torch.equal(short.timestep_map, few.timestep_map[:4])
    assert torch.equal(short.alpha_bar, few.alpha_bar[:4])
    torch.testing.assert_close(short.posterior_var, few.posterior_var[:4])


def test_respacing_is_a_new_object(schedule: diffusion.Schedule) -> None:
    whole = diffusion.respaced(schedule, 1000)
    assert whole is not schedule
    torch.testing.assert_close(whole.beta, schedule.beta)
    # Respacing twice still names the original timesteps.
    assert diffusion.respaced(diffusion.respaced(schedule, 8), 2).timestep_map.tolist() == [0, 999]
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.beta = whole.beta


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_respacing_refuses(schedule: diffusion.Schedule, n: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 1000"):
        diffusion.respaced(schedule, n)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_round_trips(schedule: diffusion.Schedule, prediction: str) -> None:
    x_0, eps = torch.rand(SHAPE) * 2 - 1, torch.randn(SHAPE)
    t = torch.tensor([0, 10, 500, 900])
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    output = eps if prediction == "eps" else diffusion.v_target(schedule, x_0, eps, t)
    x_0_again = diffusion.x_0_from(schedule, x_t, t, output, prediction)
    torch.testing.assert_close(x_0_again, x_0, rtol=0, atol=1e-5)
    # At t = 0 the noise is 0.006 of x_t: float32 leaves five digits of it.
    torch.testing.assert_close(diffusion.eps_from_x_0(schedule, x_t, t, x_0), eps, rtol=0, atol=1e-4)


def test_a_network_may_predict_x_0_itself(schedule: diffusion.Schedule) -> None:
    x_t, output = torch.randn(SHAPE), torch.randn(SHAPE)
    t = torch.tensor([0, 10, 500, 999])
    assert torch.equal(diffusion.x_0_from(schedule, x_t, t, output, "x_0"), output)


def test_what_x_t_shows_is_kept_by_a_wiener_filter(schedule: diffusion.Schedule) -> None:
    """Detail of the standard deviation that is assumed is estimated from x_t with the least squared error."""
    generator = torch.Generator().manual_seed(0)
    seen, detail, eps = (torch.randn(4, 3, 64, 64, generator=generator) for _ in range(3))
    x_0 = seen + UNDRAWN * detail
    t = torch.tensor([0, 40, 160, 900])
    x_t = diffusion.q_sample(schedule, x_0, t, eps)

    def error(keep: float) -> Tensor:
        kept = keep_seen(schedule, seen, x_t, t, torch.full((4, 1, 64, 64), keep))
        return (kept - x_0).square().mean((1, 2, 3))

    best = error(0.0)
    noise = (1 - schedule.alpha_bar[t]) / schedule.alpha_bar[t]
    # 1 / e = 1 / s^2 + 1 / n
    expected = 1 / (1 / UNDRAWN**2 + 1 / noise)
    torch.testing.assert_close(best, expected.float(), rtol=0.05, atol=0)
    assert (best[:3] < error(0.7)[:3]).all()
    assert (best[:3] < error(-0.7)[:3]).all()
    assert error(-100.0).sqrt().numpy() == pytest.approx(UNDRAWN, rel=0.05)


def test_unknown_prediction(schedule: diffusion.Schedule) -> None:
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="'eps', 'v' or 'x_0'"):
        diffusion.x_0_from(schedule, x, torch.zeros(4, dtype=torch.int64), x, "score")


@pytest.mark.parametrize("step", [1, 5, 400, 999])
def test_posterior_is_bayes(schedule: diffusion.Schedule, step: int) -> None:
    # q(x_{t-1} | x_t, x_0) is the product of two Gaussians in x_{t-1}:
    # N(sqrt(ab_prev) x_0, 1 - ab_prev) and, from x_t = sqrt(a) x_{t-1} + noise, N(x_t / sqrt(a), beta / a).
    ab_prev, beta = schedule.alpha_bar[step - 1], schedule.beta[step]
    x_0, x_t = torch.full((1, 1), 0.3), torch.full((1, 1), -0.7)
    precision = 1 / (1 - ab_prev) + (1 - beta) / beta
    mean = (ab_prev.sqrt() * x_0 / (1 - ab_prev) + (1 - beta).sqrt() * x_t / beta) / precision
    got_mean, got_log_var = diffusion.q_posterior(schedule, x_0, x_t, torch.tensor([step]))
    torch.testing.assert_close(got_mean, mean.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(got_log_var.item(), -precision.log().item(), rtol=1e-6, atol=0)


def test_learned_variance_lies_between_beta_and_posterior(schedule: diffusion.Schedule) -> None:
    x, t = torch.zeros(3, 1), torch.tensor([100, 100, 100])
    frac = torch.tensor([[-1.0], [0.0], [1.0]])
    _, log_var = diffusion.p_mean_log_var(schedule, x, x, t, frac)
    low, high = schedule.posterior_log_var[100].item(), schedule.beta[100].log().item()
    torch.testing.assert_close(log_var.flatten(), torch.tensor([low, (low + high) / 2, high]))
    torch.testing.assert_close(diffusion.p_mean_log_var(schedule, x, x, t, None)[1][0, 0].item(), low)


def test_clamp(schedule: diffusion.Schedule) -> None:
    x_t, t = torch.zeros(1, 1), torch.tensor([0])
    assert diffusion.p_mean_log_var(schedule, x_t + 3, x_t, t, None)[0].item() == 1
    assert diffusion.p_mean_log_var(schedule, x_t + 3, x_t, t, None, clamp=False)[0].item() == 3


@pytest.mark.parametrize("n", [1, 2, 5, 20])
@pytest.mark.parametrize("solver", diffusion.SOLVERS)
def test_point_data_is_found_exactly(schedule: diffusion.Schedule, solver: str, n: int) -> None:
    x_0 = torch.rand(SHAPE) * 2 - 1
    told = []

    def denoise(x_t: torch.Tensor, t: int) -> Denoised:
        told.append(t)
        return Denoised(x_0, torch.zeros(SHAPE))

    few = diffusion.respaced(schedule, n)
    result = diffusion.SOLVERS[solver](denoise, few, torch.randn(SHAPE), lambda: torch.randn(SHAPE))
    torch.testing.assert_close(result, x_0, rtol=0, atol=1e-6)
    # One evaluation a step, told the original timesteps, from the noisiest to 0.
    assert told == few.timestep_map.flip(0).tolist()


@pytest.mark.parametrize("solver", diffusion.SOLVERS)
def test_result_is_clamped(schedule: diffusion.Schedule, solver: str) -> None:
    few = diffusion.respaced(schedule, 3)
    result = diffusion.SOLVERS[solver](
        lambda x_t, t: Denoised(x_t + 7, None), few, torch.zeros(SHAPE), lambda: torch.zeros(SHAPE)
    )
    assert (result == 1).all()


def test_ddpm_draws_one_noise_a_step_but_the_last(schedule: diffusion.Schedule) -> None:
    draws = []

    def noise() -> torch.Tensor:
        draws.append(torch.randn(SHAPE))
        return draws[-1]

    few = diffusion.respaced(schedule, 6)
    diffusion.sample_ddpm(gaussian_denoiser(schedule), few, torch.randn(SHAPE), noise)
    assert len(draws) == 5


def test_ddpm_with_the_exact_variance_reaches_the_data_distribution(schedule: diffusion.Schedule) -> None:
    few = diffusion.respaced(schedule, 20)
    denoise = gaussian_denoiser(schedule)

    def with_variance(x_t: torch.Tensor, t: int) -> Denoised:
        step = few.timestep_map.tolist().index(t)
        ab = few.alpha_bar[step]
        # Var[x_{t-1} | x_t] = posterior variance + (its weight of x_0)^2 Var[x_0 | x_t]
        data_var = STD**2 * (1 - ab) / (ab * STD**2 + 1 - ab)
        log_var = (few.posterior_var[step] + few.posterior_mean_x_0[step] ** 2 * data_var).log()
        low, high = few.posterior_log_var[step], few.beta[step].log()
        var_frac = 2 * (log_var - low) / (high - low) - 1
        return Denoised(denoise(x_t, t).x_0, var_frac.float().expand_as(x_t))

    shape = (8, 1, 64, 64)
    x_t = diffusion.sample_ddpm(with_variance, few, torch.randn(shape), lambda: torch.randn(shape))
    # The last step takes the mean, which at so little noise is the data but for 0.2 % of its spread.
    assert x_t.mean().item() == pytest.approx(MEAN, abs=0.002)
    assert x_t.std().item() == pytest.approx(STD, rel=0.015)


def test_orders_of_convergence() -> None:
    x_T = torch.randn(8, 3, 8, 8)

    def ratios(solver: diffusion.Solver) -> list[float]:
        found = []
        for n in (40, 80, 160):
            # Even steps in lambda, over which both orders are clean; the cosine schedule's ends are steeper.
            lam = torch.linspace(4, -4, n, dtype=torch.float64)
            even = diffusion._schedule(torch.sigmoid(2 * lam), torch.arange(n))
            denoise = gaussian_denoiser(even)
            # Both end with the x_0 predicted from where the flow has come at step 0.
            flow = gaussian_flow(even, x_T, to=0)
            exact = denoise(flow, 0).x_0
            found.append((solver(denoise, even, x_T, no_noise) - exact).square().mean().sqrt().item())
        return [coarse / fine for coarse, fine in itertools.pairwise(found)]

    assert ratios(diffusion.sample_ddim) == pytest.approx([2, 2], rel=0.1)
    assert ratios(diffusion.sample_dpmpp_2m) == pytest.approx([4, 4], rel=0.15)


@pytest.mark.parametrize("n", [10, 20, 50])
def test_second_order_is_nearer_on_the_cosine_schedule(schedule: diffusion.Schedule, n: int) -> None:
    x_T = torch.randn(8, 3, 8, 8)
    few, denoise = diffusion.respaced(schedule, n), gaussian_denoiser(schedule)
    exact = gaussian_flow(schedule, x_T, to=0)
    first, second = (
        (solver(denoise, few, x_T, no_noise) - exact).square().mean().sqrt()
        for solver in (diffusion.sample_ddim, diffusion.sample_dpmpp_2m)
    )
    assert second < 0.7 * first


def test_released_tables(schedule: diffusion.Schedule, golden: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(schedule.alpha_bar.float(), golden["alpha_bar_1000"], rtol=1e-2, atol=0)
    torch.testing.assert_close(schedule.beta.float(), golden["beta_1000"], rtol=1e-2, atol=0)


@pytest.mark.parametrize("n", [2, 8, 50, 100, 200])
def test_released_respacing(schedule: diffusion.Schedule, golden: dict[str, torch.Tensor], n: int) -> None:
    few = diffusion.respaced(schedule, n)
    assert torch.equal(few.timestep_map, golden[f"respaced_{n}.timesteps"])
    torch.testing.assert_close(few.beta.float(), golden[f"respaced_{n}.beta"], rtol=1e-2, atol=0)
