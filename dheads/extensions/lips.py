"""The lip code: three measures of the mouth in every frame, and their prediction from speech.

The measures, in eye distances: the opening of the inner lips, and the mouth's width and the lips' thickness relative to
the clip's median. In training the network is given the true code, in sampling the one that ridge regression predicts
from a window of speech embeddings.
Why: hours of training on some 40 people do not teach a network to read speech embeddings, but it follows three numbers:
mouths that are given the true code correlate with the true opening by 0.91. Off: no table extensions.codes.lips.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dheads.conditioning import window
from dheads.config import Config

MEASURES = ("opening", "width", "thickness")
_RIDGES = (0.1, 1.0, 10.0)  # candidate penalties, relative to the features' mean variance
_FOLDS = 5
_TRIALS, _TRIAL_REACH = 6, 5  # stretches of speech to try a face on, and frames on either side of their middle


def centred(measures: Tensor) -> Tensor:
    """Measures (F, 3) with everything but the opening relative to the clip's median.

    An opening of zero is a closed mouth for everybody; widths and thicknesses are a person's own.
    """
    person = measures.median(dim=0).values * torch.tensor([0.0, 1.0, 1.0])
    return measures - person


@dataclass(frozen=True)
class LipClip:
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
    trials: Tensor

    def __init__(self, speech_dim: int) -> None:
        super().__init__()
        inputs, outputs = (2 * self.context + 1) * speech_dim, len(MEASURES)
        self.register_buffer("mean", torch.zeros(outputs))
        self.register_buffer("std", torch.ones(outputs))
        self.register_buffer("weight", torch.zeros(inputs, outputs))
        self.register_buffer("bias", torch.zeros(outputs))
        # Speech at whose middle mouths are open by little to much, to find out how far a face follows; 0 before a fit.
        self.register_buffer("trials", torch.zeros(_TRIALS, 2 * _TRIAL_REACH + 1, speech_dim))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Older weights lack the trials."""
        state_dict.setdefault(f"{prefix}trials", torch.zeros(self.trials.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def normalise(self, code: Tensor) -> Tensor:
        """(..., L) measures -> the code as the network takes it."""
        return (code - self.mean) / self.std

    def predict(self, speech: Tensor) -> Tensor:
        """Speech embeddings (F, D) -> normalised lip codes (F, L), which vary as much as an average speaker's."""
        return _features(speech) @ self.weight + self.bias

    def opening(self, speech: Tensor) -> Tensor:
        """Speech embeddings (F, D) -> the opening (F,) that it foretells, in eye distances."""
        return self.told(self.predict(speech))

    def told(self, codes: Tensor) -> Tensor:
        """Normalised lip codes (..., L) -> the opening (...) that they tell, in eye distances."""
        return codes[..., 0] * self.std[0] + self.mean[0]

    @torch.no_grad()
    def fit(self, clips: Sequence[LipClip]) -> Tensor:
        """Fit to clips; returns the correlation (L,) over time that unseen speakers can expect, averaged over speakers.

        What a person's mouth does on average cannot be heard, so each clip counts relative to its own mean. The
        penalty, the spread and the mean of the predictions come from speakers left out of the fit, in turns.
        """
        codes = torch.cat([clip.measures for clip in clips])
        self.mean.copy_(codes.mean(0))
        self.std.copy_(codes.std(0).clamp(min=1e-6))
        speakers = sorted({clip.speaker for clip in clips})
        folds: list[list[LipClip]] = [[] for _ in range(min(_FOLDS, len(speakers)))]
        for clip in clips:
            folds[speakers.index(clip.speaker) % len(folds)].append(clip)
        moments = [self._moments(fold) for fold in folds]
        gram, moment = (torch.stack(parts).sum(0) for parts in zip(*moments, strict=True))
        best: tuple[float, Tensor] | None = None
        for ridge in _RIDGES:
            scores = []
            for fold, (fold_gram, fold_moment) in zip(folds, moments, strict=True):
                others = (gram - fold_gram, moment - fold_moment) if len(folds) > 1 else (gram, moment)
                weight = _solve(*others, ridge).float()
                scores += [self._score(clip, weight) for clip in fold]
            by_speaker = _speaker_means([clip.speaker for fold in folds for clip in fold], torch.stack(scores))
            if best is None or by_speaker[0, 0] > best[1][0, 0]:
                best = ridge, by_speaker
        assert best is not None
        ridge, (correlation, spread, true_spread, true_mean) = best
        gain = true_spread / spread.clamp(min=1e-6)
        self.weight.copy_(_solve(gram, moment, ridge).float() * gain)
        heard = _speaker_means([clip.speaker for clip in clips], self._heard_means(clips))[0]
        self.bias.copy_(true_mean - heard)
        self.choose_trials([clip.speech for clip in clips])
        return correlation

    @torch.no_grad()
    def choose_trials(self, speech: Sequence[Tensor]) -> None:
        """Take trials from embeddings (F, D) of clips: their openings are spread evenly over those that are heard."""
        frames = [(clip, frame) for clip, rows in enumerate(speech) for frame in range(len(rows))]
        ranked = torch.cat([self.opening(rows) for rows in speech]).argsort()
        for trial, share in zip(self.trials, torch.linspace(0.03, 0.97, _TRIALS).tolist(), strict=True):
            clip, frame = frames[int(ranked[round(share * (len(ranked) - 1))])]
            trial.copy_(window(speech[clip], frame, _TRIAL_REACH))

    def _moments(self, clips: Sequence[LipClip]) -> tuple[Tensor, Tensor]:
        inputs, outputs = self.weight.shape
        gram, moment = torch.zeros(inputs, inputs), torch.zeros(inputs, outputs)
        for clip in clips:
            x, y = _centre(_features(clip.speech)), _centre(self.normalise(clip.measures))
            gram += x.T @ x
            moment += x.T @ y
        return gram.double(), moment.double()

    def _score(self, clip: LipClip, weight: Tensor) -> Tensor:
        """(4, L): correlation, the prediction's and the truth's standard deviation, the truth's mean."""
        code = self.normalise(clip.measures)
        predicted = _features(clip.speech) @ weight
        return torch.stack([_correlation(predicted, code), predicted.std(0), code.std(0), code.mean(0)])

    def _heard_means(self, clips: Sequence[LipClip]) -> Tensor:
        return torch.stack([(_features(clip.speech) @ self.weight).mean(0)[None] for clip in clips])


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


class LipTrack:
    """The lip code of one video, predicted from its speech."""

    reach = LipPredictor.context

    def __init__(self, predictor: LipPredictor) -> None:
        self._predictor = copy.deepcopy(predictor).cpu()  # cheap to compute where the speech is
        self._last: tuple[Tensor, Tensor] | None = None

    def codes(self, speech: Tensor) -> Tensor:
        """Speech embeddings (n, D) -> normalised lip codes (n, L)."""
        if self._last is None or self._last[0] is not speech:
            self._last = speech, self._predictor.predict(speech)
        return self._last[1]

    def window(self, frame: int, speech: Tensor, at: int, context: int) -> Tensor:
        return window(self.codes(speech), at, context)


class LipCode:
    """See the module's docstring."""

    name, embedding, dims = "lips", "lip_embed", len(MEASURES)
    usual: Sequence[float] = (1.0,) * dims
    is_heard, begins_at_zero = True, False
    points = range(48, 68)  # landmarks of the mouth

    def measured(self, labels: Mapping[str, Tensor]) -> Tensor:
        return centred(labels["lips"])

    def events(self, code: Tensor) -> list[int]:
        return []

    def fitted(self, config: Config) -> LipPredictor:
        return LipPredictor(config.conditioning.speech_dim)

    def normalised(self, code: Tensor, fitted: nn.Module | None) -> Tensor:
        assert isinstance(fitted, LipPredictor)
        return fitted.normalise(code)

    def track(self, fitted: nn.Module | None, seed: int, event_rate: float) -> LipTrack:
        assert isinstance(fitted, LipPredictor)
        return LipTrack(fitted)
