"""The lip code (beyond the paper): mouth measures of every frame, and their prediction from speech.

Three measures, each in eye distances: the opening of the inner lips, and the mouth's width and the lips' thickness
relative to the clip's median. In training the network is told the true code, in sampling the one that ridge regression
predicts from a window of speech embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dheads.conditioning import window
from dheads.config import ConditioningConfig

MEASURES = ("opening", "width", "thickness")
_RIDGES = (0.1, 1.0, 10.0)  # candidate penalties, relative to the features' mean variance
_FOLDS = 5


def centred(measures: Tensor) -> Tensor:
    """Measures (F, 3) with everything but the opening relative to the clip's median.

    An opening of zero is a closed mouth for everybody; widths and thicknesses are a person's own.
    """
    person = measures.median(dim=0).values * torch.tensor([0.0, 1.0, 1.0])
    return measures - person


@dataclass(frozen=True)
class Talk:
    """One clip to fit to."""

    speaker: str
    speech: Tensor  # (F, D)
    measures: Tensor  # (F, 3), centred


class LipPredictor(nn.Module):
    """Normalises lip codes to zero mean and unit variance, and predicts them from speech by ridge regression."""

    context = 3  # frames of speech on either side that a code is predicted from
    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, told: ConditioningConfig) -> None:
        super().__init__()
        inputs = (2 * self.context + 1) * told.speech_dim
        self.register_buffer("mean", torch.zeros(told.lip_dims))
        self.register_buffer("std", torch.ones(told.lip_dims))
        self.register_buffer("weight", torch.zeros(inputs, told.lip_dims))
        self.register_buffer("bias", torch.zeros(told.lip_dims))

    def normalise(self, code: Tensor) -> Tensor:
        """(..., L) measures -> the code that the network is told."""
        return (code - self.mean) / self.std

    def predict(self, speech: Tensor) -> Tensor:
        """Speech embeddings (F, D) -> normalised lip codes (F, L), which vary as much as an average speaker's."""
        return _features(speech) @ self.weight + self.bias

    @torch.no_grad()
    def fit(self, talks: Sequence[Talk]) -> Tensor:
        """Fit to clips; returns the correlation (L,) over time that unseen speakers can expect, averaged over speakers.

        What a person's mouth does on average cannot be heard, so each clip counts relative to its own mean. The
        penalty, the spread and the mean of the predictions come from speakers left out of the fit, in turns.
        """
        codes = torch.cat([talk.measures for talk in talks])
        self.mean.copy_(codes.mean(0))
        self.std.copy_(codes.std(0).clamp(min=1e-6))
        speakers = sorted({talk.speaker for talk in talks})
        folds: list[list[Talk]] = [[] for _ in range(min(_FOLDS, len(speakers)))]
        for talk in talks:
            folds[speakers.index(talk.speaker) % len(folds)].append(talk)
        moments = [self._moments(fold) for fold in folds]
        gram, moment = (torch.stack(parts).sum(0) for parts in zip(*moments, strict=True))
        best: tuple[float, Tensor] | None = None
        for ridge in _RIDGES:
            scores = []
            for fold, (fold_gram, fold_moment) in zip(folds, moments, strict=True):
                others = (gram - fold_gram, moment - fold_moment) if len(folds) > 1 else (gram, moment)
                weight = _solve(*others, ridge).float()
                scores += [self._score(talk, weight) for talk in fold]
            by_speaker = _speaker_means([talk.speaker for fold in folds for talk in fold], torch.stack(scores))
            if best is None or by_speaker[0, 0] > best[1][0, 0]:
                best = ridge, by_speaker
        assert best is not None
        ridge, (correlation, spread, true_spread, true_mean) = best
        gain = true_spread / spread.clamp(min=1e-6)
        self.weight.copy_(_solve(gram, moment, ridge).float() * gain)
        heard = _speaker_means([talk.speaker for talk in talks], self._heard_means(talks))[0]
        self.bias.copy_(true_mean - heard)
        return correlation

    def _moments(self, talks: Sequence[Talk]) -> tuple[Tensor, Tensor]:
        inputs, outputs = self.weight.shape
        gram, moment = torch.zeros(inputs, inputs), torch.zeros(inputs, outputs)
        for talk in talks:
            x, y = _centre(_features(talk.speech)), _centre(self.normalise(talk.measures))
            gram += x.T @ x
            moment += x.T @ y
        return gram.double(), moment.double()

    def _score(self, talk: Talk, weight: Tensor) -> Tensor:
        """(4, L): correlation, the prediction's and the truth's standard deviation, the truth's mean."""
        code = self.normalise(talk.measures)
        predicted = _features(talk.speech) @ weight
        return torch.stack([_correlation(predicted, code), predicted.std(0), code.std(0), code.mean(0)])

    def _heard_means(self, talks: Sequence[Talk]) -> Tensor:
        return torch.stack([(_features(talk.speech) @ self.weight).mean(0)[None] for talk in talks])


def _features(speech: Tensor) -> Tensor:
    """(F, D) -> (F, 7 D): the embeddings around every frame."""
    return window(speech, torch.arange(len(speech)), LipPredictor.context).flatten(1)


def _centre(values: Tensor) -> Tensor:
    return values - values.mean(0)


def _solve(gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
    # w = (X^T X + ridge mean(diag) I)^-1 X^T y
    penalty = ridge * gram.diagonal().mean().clamp(min=1e-9) * torch.eye(len(gram), dtype=gram.dtype)
    return torch.cholesky_solve(moment, torch.linalg.cholesky(gram + penalty))


def _speaker_means(speakers: Sequence[str], rows: Tensor) -> Tensor:
    """The mean over speakers of each speaker's mean: rows (N, ...) -> (...)."""
    means = [rows[[s == speaker for s in speakers]].mean(0) for speaker in sorted(set(speakers))]
    return torch.stack(means).mean(0)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r of each column of two (N, L) tensors; 0 where one does not vary."""
    a, b = _centre(a), _centre(b)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-8)
