"""The lip code (beyond the paper): mouth measures of every frame, and their prediction from speech.

Three measures, each in eye distances: the opening of the inner lips, and the mouth's width and the lips' thickness
relative to the clip's median. In training the network is told the true code, in sampling the one that ridge regression
predicts from a window of speech embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dheads.conditioning import window
from dheads.config import ConditioningConfig

MEASURES = ("opening", "width", "thickness")
_CONTEXT = 3  # frames of speech on either side that the regression sees
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # candidate penalties, relative to the features' mean variance


def centred(measures: Tensor) -> Tensor:
    """Measures (F, 3) with everything but the opening relative to the clip's median.

    An opening of zero is a closed mouth for everybody; widths and thicknesses are a person's own.
    """
    person = measures.median(dim=0).values * torch.tensor([0.0, 1.0, 1.0])
    return measures - person


class LipPredictor(nn.Module):
    """Normalises lip codes to zero mean and unit variance, and predicts them from speech by ridge regression."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, told: ConditioningConfig) -> None:
        super().__init__()
        inputs = (2 * _CONTEXT + 1) * told.speech_dim
        self.register_buffer("mean", torch.zeros(told.lip_dims))
        self.register_buffer("std", torch.ones(told.lip_dims))
        self.register_buffer("weight", torch.zeros(inputs, told.lip_dims))
        self.register_buffer("bias", torch.zeros(told.lip_dims))

    def normalise(self, code: Tensor) -> Tensor:
        """(..., L) measures -> the code that the network is told."""
        return (code - self.mean) / self.std

    def predict(self, speech: Tensor) -> Tensor:
        """Speech embeddings (F, D) -> normalised lip codes (F, L) with the spread of true ones."""
        return _features(speech) @ self.weight + self.bias

    @torch.no_grad()
    def fit(self, train: Sequence[tuple[Tensor, Tensor]], held_out: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Fit to (speech (F, D), centred measures (F, L)) pairs; returns the correlations (L,) on the held-out pairs.

        The held-out speakers choose the penalty and the gain that brings predictions to unit variance. Every speaker's
        clips should weigh as wished already: pairs are taken as they come.
        """
        codes = torch.cat([code for _, code in train])
        self.mean.copy_(codes.mean(0))
        self.std.copy_(codes.std(0))
        inputs, outputs = self.weight.shape
        gram = torch.zeros(inputs, inputs, dtype=torch.float64)
        moment = torch.zeros(inputs, outputs, dtype=torch.float64)
        centre = torch.cat([speech.float() for speech, _ in train]).mean(0).repeat(2 * _CONTEXT + 1)
        for speech, code in train:
            x = (_features(speech.float()) - centre).double()
            gram += x.T @ x
            moment += x.T @ self.normalise(code).double()
        best: tuple[Tensor, Tensor, Tensor] | None = None
        truth = torch.cat([self.normalise(code) for _, code in held_out])
        for ridge in _RIDGES:
            penalty = ridge * gram.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
            weight = torch.linalg.solve(gram + penalty, moment).float()
            predicted = torch.cat([(_features(speech.float()) - centre) @ weight for speech, _ in held_out])
            fit = _correlation(predicted, truth)
            if best is None or fit[0] > best[2][0]:
                best = weight / predicted.std(0), predicted.mean(0) / predicted.std(0), fit
        if best is None:
            raise ValueError("no penalty to choose from")
        weight, shift, fit = best
        self.weight.copy_(weight)
        self.bias.copy_(-centre @ weight - shift)
        return fit


def _features(speech: Tensor) -> Tensor:
    """(F, D) -> (F, 7 D): the embeddings around every frame."""
    return window(speech, torch.arange(len(speech)), _CONTEXT).flatten(1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r of each column of two (N, L) tensors."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-8)
