"""The training losses, each one value a sample (B,), and their weighted sum.

L = L_simple + lambda_vlb L_vlb + lambda_ls L_ls: the hybrid loss of Improved DDPM, and the paper's lip loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dheads.diffusion import Schedule, extract, p_mean_log_var, q_posterior


def simple(target: Tensor, output: Tensor) -> Tensor:
    """L_simple: the mean squared error of each sample, (B, ...) -> (B,)."""
    return (target - output).square().flatten(1).mean(1)


def vlb(schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor, x_0_pred: Tensor, var_frac: Tensor) -> Tensor:
    """L_vlb: the variational bound's term of step t, in bits a dimension, (B, ...) -> (B,).

    Trains the variance only: the predicted mean is detached here (Improved DDPM's hybrid loss). x_0_pred is clamped to
    [-1, 1], as in sampling. var_frac: the network's raw variance output.
    """
    mean, log_var = p_mean_log_var(schedule, x_0_pred.detach(), x_t, t, var_frac)
    true_mean, true_log_var = q_posterior(schedule, x_0, x_t, t)
    # KL(N(m1, v1) || N(m2, v2)) = (log v2 - log v1 + v1 / v2 + (m1 - m2)^2 / v2 - 1) / 2
    gap = (true_mean - mean).square() * torch.exp(-log_var)
    kl = 0.5 * (log_var - true_log_var + torch.exp(true_log_var - log_var) + gap - 1)
    nats = torch.where(t.view(-1, *[1] * (x_0.ndim - 1)) == 0, _decoder_nll(x_0, mean, log_var), kl)
    return nats.flatten(1).mean(1) / math.log(2)


def inside(error_squared: Tensor, box: Tensor) -> Tensor:
    """The mean of a squared error (B, C, H, W) inside each sample's box, (B,); with the mouth's box L_ls.

    box (B, 4): x0 y0 x1 y1 in pixels, half-open. A box without a pixel inside the picture gives 0.
    """
    height, width = error_squared.shape[-2:]
    x0, y0, x1, y1 = box.to(error_squared.device)[:, :, None].unbind(1)  # (B, 1) each
    x = torch.arange(width, device=error_squared.device)
    y = torch.arange(height, device=error_squared.device)
    inside_x, inside_y = (x >= x0) & (x < x1), (y >= y0) & (y < y1)  # (B, W), (B, H)
    mask = (inside_y[:, :, None] & inside_x[:, None, :]).to(error_squared.dtype)  # (B, H, W)
    return (error_squared.mean(1) * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)


def total(simple: Tensor, vlb: Tensor, lip: Tensor, lambda_vlb: float, lambda_lip: float) -> Tensor:
    """The whole loss, a new tensor: L = L_simple + lambda_vlb L_vlb + lambda_ls L_ls (the paper: 1e-4 and 0.2)."""
    return simple + lambda_vlb * vlb + lambda_lip * lip


def snr_weight(schedule: Schedule, t: Tensor, clip: float) -> Tensor:
    """The weight (B,) of a squared x_0 error that makes it the v-loss, truncated: min(snr + 1, clip)."""
    # |v - v'|^2 = (snr + 1) |x_0 - x_0'|^2,  snr + 1 = 1 / (1 - ab)
    return extract((1 / (1 - schedule.alpha_bar)).clamp(max=clip), t, t)


def _decoder_nll(x_0: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log p(x_0) in nats of 8-bit values scaled to [-1, 1] under a Gaussian integrated over each value's bin."""
    scale = torch.exp(-0.5 * log_var)
    upper = _normal_cdf((x_0 + 1 / 255 - mean) * scale)
    lower = _normal_cdf((x_0 - 1 / 255 - mean) * scale)
    # The outermost bins reach to infinity.
    upper = torch.where(x_0 > 0.999, 1.0, upper)
    lower = torch.where(x_0 < -0.999, 0.0, lower)
    return -(upper - lower).clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    # Phi(z) ~ (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2, within 2e-4: what the released code uses.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
