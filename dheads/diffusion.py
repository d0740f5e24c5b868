"""Gaussian diffusion: schedule tables, the forward and reverse distributions, and solvers that are pure functions.

Names follow Improved DDPM (Nichol & Dhariwal 2021); ab, alpha_bar, is the share of the signal's variance left at t.
Here t indexes the schedule at hand (0 .. num_steps - 1); a network is always given `schedule.timestep_map[t]`, the
timestep it was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """The tables of a diffusion process: float64 CPU tensors of length `num_steps`, never edited."""

    beta: Tensor
    alpha_bar: Tensor
    alpha_bar_prev: Tensor  # alpha_bar of the step before, 1 at step 0
    posterior_mean_x_0: Tensor  # weights of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0)
    posterior_mean_x_t: Tensor
    posterior_var: Tensor
    posterior_log_var: Tensor  # clipped: entry 0, log 0, is replaced by entry 1
    timestep_map: Tensor  # (num_steps,) int64: the timestep of the original schedule

    @property
    def num_steps(self) -> int:
        return len(self.beta)


def cosine_schedule(num_steps: int = 1000, s: float = 0.008, beta_max: float = 0.999) -> Schedule:
    """The cosine schedule of Improved DDPM (eq. 17); the paper has s = 0.008 and beta <= 0.999."""
    # f(t) = cos^2((t / T + s) / (1 + s) * pi / 2),  beta_t = min(1 - f(t + 1) / f(t), beta_max)
    time = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    signal = torch.cos((time + s) / (1 + s) * math.pi / 2) ** 2
    beta = (1 - signal[1:] / signal[:-1]).clamp(max=beta_max)
    return _schedule(torch.cumprod(1 - beta, dim=0), torch.arange(num_steps))


def respaced(schedule: Schedule, n: int, spacing: str = "uniform") -> Schedule:
    """A new schedule of n of the steps, spread from the first to the last (n = 1: the last alone).

    spacing: uniform in t, as the released code has it; quadratic, with more of them where little noise is left; or
    logsnr, uniform in the logarithm of the signal-to-noise ratio.
    Raises ValueError unless 1 <= n <= schedule.num_steps.
    """
    if not 1 <= n <= schedule.num_steps:
        raise ValueError(f"steps must be between 1 and {schedule.num_steps}, not {n}")
    last = schedule.num_steps - 1
    if n == 1:
        steps = [last]
    elif spacing == "logsnr":
        steps = _even_in_log_snr(schedule, n)
    else:
        power = {"uniform": 1, "quadratic": 2}[spacing]
        # Many quadratic steps would meet near 0: none comes twice.
        steps = [max(i, round(last * i**power / (n - 1) ** power)) for i in range(n)]
    return at_steps(schedule, steps)


def at_steps(schedule: Schedule, steps: list[int]) -> Schedule:
    """A new schedule of these of the steps, in rising order."""
    index = torch.tensor(steps)
    return _schedule(schedule.alpha_bar[index], schedule.timestep_map[index])


def _even_in_log_snr(schedule: Schedule, n: int) -> list[int]:
    """n steps whose log signal-to-noise ratios are as evenly spread as distinct steps can be."""
    log_snr = torch.logit(schedule.alpha_bar)  # log ab / (1 - ab), falls with t
    wanted = torch.linspace(float(log_snr[0]), float(log_snr[-1]), n, dtype=log_snr.dtype)
    steps = (log_snr - wanted[:, None]).abs().argmin(dim=1).tolist()
    for i in range(1, n):  # none comes twice
        steps[i] = max(steps[i], steps[i - 1] + 1)
    for i in reversed(range(n)):
        steps[i] = min(steps[i], schedule.num_steps - n + i)
    return steps


def shortened(schedule: Schedule, n: int) -> Schedule:
    """A new schedule of the n steps with the least noise."""
    return _schedule(schedule.alpha_bar[:n], schedule.timestep_map[:n])


def _schedule(alpha_bar: Tensor, timestep_map: Tensor) -> Schedule:
    alpha_bar_prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    # q(x_{t-1} | x_t, x_0): var = beta (1 - ab_prev) / (1 - ab)
    posterior_var = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    # A schedule of one step has no second entry: beta stands in.
    floor = posterior_var[1:2] if len(beta) > 1 else beta
    return Schedule(
        beta=beta,
        alpha_bar=alpha_bar,
        alpha_bar_prev=alpha_bar_prev,
        # mean = sqrt(ab_prev) beta / (1 - ab) x_0 + sqrt(alpha) (1 - ab_prev) / (1 - ab) x_t
        posterior_mean_x_0=alpha_bar_prev.sqrt() * beta / (1 - alpha_bar),
        posterior_mean_x_t=alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar),
        posterior_var=posterior_var,
        posterior_log_var=torch.cat([floor, posterior_var[1:]]).log(),
        timestep_map=timestep_map,
    )


def extract(table: Tensor, index: Tensor | int, like: Tensor) -> Tensor:
    """Values of a table in float32 that broadcast against `like` (B, ...).

    index (B,): each sample's own, (B, 1, ..., 1) on the device of `like`. An int: one number for all, which stays on
    the CPU, so that no device is waited for.
    """
    values = table.to(torch.float32)  # some devices have no float64
    if isinstance(index, int):
        return values[index]
    values = values.to(like.device)[index.to(like.device)]
    return values.view(-1, *[1] * (like.ndim - 1))


def q_sample(schedule: Schedule, x_0: Tensor, t: Tensor | int, eps: Tensor) -> Tensor:
    """A sample of q(x_t | x_0) with the given noise; (B, ...) each, t (B,) or one for all."""
    # x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps
    return signal_rate(schedule, t, x_0) * x_0 + noise_rate(schedule, t, x_0) * eps


def v_target(schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The target of v-prediction (Salimans & Ho 2022)."""
    # v = sqrt(ab) eps - sqrt(1 - ab) x_0
    return signal_rate(schedule, t, x_0) * eps - noise_rate(schedule, t, x_0) * x_0


def x_0_from(schedule: Schedule, x_t: Tensor, t: Tensor | int, output: Tensor, prediction: str) -> Tensor:
    """x_0, unclamped, as implied by a network's output that predicts "eps", "v" or "x_0"."""
    if prediction == "eps":
        # x_0 = (x_t - sqrt(1 - ab) eps) / sqrt(ab)
        return (x_t - noise_rate(schedule, t, x_t) * output) / signal_rate(schedule, t, x_t)
    if prediction == "v":
        # x_0 = sqrt(ab) x_t - sqrt(1 - ab) v
        return signal_rate(schedule, t, x_t) * x_t - noise_rate(schedule, t, x_t) * output
    if prediction == "x_0":
        return output
    raise ValueError(f"prediction must be 'eps', 'v' or 'x_0', not {prediction!r}")


def eps_from_x_0(schedule: Schedule, x_t: Tensor, t: Tensor | int, x_0: Tensor) -> Tensor:
    """The noise that leads from x_0 to x_t."""
    # eps = (x_t - sqrt(ab) x_0) / sqrt(1 - ab)
    return (x_t - signal_rate(schedule, t, x_t) * x_0) / noise_rate(schedule, t, x_t)


def q_posterior(schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and clipped log-variance, as `extract` shapes it, of q(x_{t-1} | x_t, x_0)."""
    mean = extract(schedule.posterior_mean_x_0, t, x_t) * x_0 + extract(schedule.posterior_mean_x_t, t, x_t) * x_t
    return mean, extract(schedule.posterior_log_var, t, x_t)


def p_mean_log_var(
    schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor | int, var_frac: Tensor | None, *, clamp: bool = True
) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the model's p(x_{t-1} | x_t), given its x_0.

    var_frac: the network's raw variance output, -1 for the posterior variance and 1 for beta (Improved DDPM eq. 15), or
    None for the posterior variance. clamp: bring x_0 into [-1, 1] first, as sampling does.
    """
    mean, log_var = q_posterior(schedule, x_0.clamp(-1, 1) if clamp else x_0, x_t, t)
    if var_frac is None:
        return mean, log_var
    # log var = f log beta + (1 - f) log posterior_var,  f = (var_frac + 1) / 2
    return mean, log_var + (var_frac + 1) / 2 * (extract(schedule.beta.log(), t, x_t) - log_var)


def signal_rate(schedule: Schedule, t: Tensor | int, like: Tensor) -> Tensor:
    """sqrt(ab), which broadcasts against `like` (B, ...)."""
    return extract(schedule.alpha_bar.sqrt(), t, like)


def noise_rate(schedule: Schedule, t: Tensor | int, like: Tensor) -> Tensor:
    """sqrt(1 - ab), which broadcasts against `like` (B, ...)."""
    return extract((1 - schedule.alpha_bar).sqrt(), t, like)


class Denoised(NamedTuple):
    """A network's output for x_t: x_0, unclamped, and the raw variance output where it has one."""

    x_0: Tensor
    var_frac: Tensor | None


# (x_t, the original timestep, the same for all samples) -> Denoised
Denoise = Callable[[Tensor, int], Denoised]
# () -> a fresh standard normal sample of the shape of x_T
Noise = Callable[[], Tensor]
Solver = Callable[[Denoise, Schedule, Tensor, Noise], Tensor]


def sample_ddpm(denoise: Denoise, schedule: Schedule, x_T: Tensor, noise: Noise) -> Tensor:
    """Ancestral sampling (Ho et al. 2020) from x_T (B, ...) to x_0; noise is drawn once a step, none at step 0."""
    x_t = x_T
    for step in reversed(range(schedule.num_steps)):
        x_0, var_frac = denoise(x_t, _timestep(schedule, step))
        mean, log_var = p_mean_log_var(schedule, x_0, x_t, step, var_frac)
        # x_{t-1} = mean + sigma z
        x_t = mean + (0.5 * log_var).exp() * noise() if step > 0 else mean
    return x_t


def sample_ddim(denoise: Denoise, schedule: Schedule, x_T: Tensor, noise: Noise) -> Tensor:
    """Deterministic DDIM, eta = 0 (Song et al. 2021), from x_T (B, ...) to x_0; draws no noise."""
    x_t = x_T
    for step in reversed(range(schedule.num_steps)):
        x_0 = denoise(x_t, _timestep(schedule, step)).x_0.clamp(-1, 1)
        eps = eps_from_x_0(schedule, x_t, step, x_0)
        # x_{t-1} = sqrt(ab_prev) x_0 + sqrt(1 - ab_prev) eps
        before = schedule.alpha_bar_prev[step].item()
        x_t = math.sqrt(before) * x_0 + math.sqrt(1 - before) * eps
    return x_t


def sample_dpmpp_2m(denoise: Denoise, schedule: Schedule, x_T: Tensor, noise: Noise) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2), data prediction, from x_T (B, ...) to x_0; draws no noise.

    The last step goes to a noise of zero, where lambda is infinite and only the first order is defined: the result is
    the x_0 predicted at step 0. Beyond that paper: the extrapolation never exceeds the last change of x_0, because the
    cosine schedule's last steps are far longer in lambda than those before, and would overshoot.
    """
    alpha = schedule.alpha_bar.sqrt().tolist()
    sigma = (1 - schedule.alpha_bar).sqrt().tolist()
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]  # half the log signal-to-noise ratio
    x_t, x_0_last = x_T, None
    for step in reversed(range(1, schedule.num_steps)):
        x_0 = denoise(x_t, _timestep(schedule, step)).x_0.clamp(-1, 1)
        h = lam[step - 1] - lam[step]
        ahead = x_0
        if x_0_last is not None:
            # D = x_0 + (x_0 - x_0_last) / (2 r),  r = h_last / h, at least 1/2
            # Near step 0 the cosine schedule's h grows several times a step, and the full extrapolation overshoots.
            ahead = x_0 + min(h / (2 * (lam[step] - lam[step + 1])), 1) * (x_0 - x_0_last)
        # x_{t-1} = sigma_{t-1} / sigma_t x_t - alpha_{t-1} (e^-h - 1) D
        x_t = sigma[step - 1] / sigma[step] * x_t - alpha[step - 1] * math.expm1(-h) * ahead
        x_0_last = x_0
    return denoise(x_t, _timestep(schedule, 0)).x_0.clamp(-1, 1)


def _timestep(schedule: Schedule, step: int) -> int:
    return int(schedule.timestep_map[step])


SOLVERS: dict[str, Solver] = {"ddpm": sample_ddpm, "ddim": sample_ddim, "dpm++2m": sample_dpmpp_2m}
