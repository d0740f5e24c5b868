"""Makes the teacher open the mouth of every face by as much as the lip code says.

Networks follow the lip code more closely on some faces than on others: a mouth that smiles, or that is seen from the
side, may open by a quarter of what the code says. So the code that the teacher is given is moved along the line on
which mouths open, to where the mouth that it draws is open as far as the code said at first. A student that is given
the first code, and the frame drawn for the moved one, learns to follow the code on every face.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_mesh import TorchMesh

from dheads.conditioning import Cues
from dheads.config import Config
from dheads.dataset.dataset import Dataset, code_label
from dheads.extensions.lips import LipCode, LipPredictor
from dheads.extensions.motion import pose_of
from dheads.sampling.engine import Inputs

_MOVES = (-2.0, -1.0, 0.0, 1.0, 2.0)  # of the code's opening, standard deviations; between them is interpolated
_FINE = 81  # places between the first and the last of them
_PRICE = 0.005  # eye distances a standard deviation: where several are as good, the smallest is taken
_USUAL = 2.5  # standard deviations: no code moves beyond, as mouths tear at codes that training has not shown


class LipCorrection:
    """Moves lip codes until the mouths that are drawn are open as far as the codes said at first."""

    def __init__(self, config: Config, predictor: LipPredictor, direction: Tensor) -> None:
        """direction (L,): how a code changes with its opening, as `opening_direction` has it."""
        self._config, self._predictor, self._direction = config, predictor, direction
        self._mesh = TorchMesh(config.alignment).to(direction.device)

    def shown(self, frames: Tensor, cues: Cues) -> Tensor:
        """The openings (B,) of the mouths in frames (B, 3, H, W), in eye distances."""
        return self._mesh.opening(frames, pose_of(self._config, cues))

    def told(self, cues: Cues) -> Tensor:
        """The openings (B,) that lip codes (B, 2 context + 1, L) tell, in eye distances; none is below 0."""
        codes = cues.codes[LipCode.name]
        return self._predictor.told(codes[:, codes.shape[1] // 2]).clamp(min=0)

    def moved(self, inputs: Inputs, by: Tensor) -> Inputs:
        """The same inputs with lip codes moved by `by` (B,) standard deviations of the opening."""
        codes = inputs.cues.codes[LipCode.name]
        limit = codes.abs().clamp(min=_USUAL)
        moved = (codes + by[:, None, None] * self._direction).clamp(-limit, limit)
        cues = Cues(inputs.cues.audio_window, {**inputs.cues.codes, LipCode.name: moved})
        return dataclasses.replace(inputs, cues=cues)

    def inputs(self, inputs: Inputs, drawn: Callable[[Inputs], Tensor]) -> Inputs:
        """The inputs whose mouths are drawn open as far as these say. drawn: makes frames (B, 3, H, W) of inputs."""
        told = self.told(inputs.cues)
        tried = (self.moved(inputs, torch.full_like(told, by)) for by in _MOVES)
        openings = torch.stack([self.shown(drawn(given), given.cues) for given in tried], 1)  # (B, moves)
        moves = torch.linspace(_MOVES[0], _MOVES[-1], _FINE, device=told.device)
        between = F.interpolate(openings[:, None], _FINE, mode="linear", align_corners=True)[:, 0]
        cost = (between - told[:, None]).abs() + _PRICE * moves.abs()  # (B, _FINE)
        return self.moved(inputs, moves[cost.argmin(1)])


def opening_direction(dataset: Dataset, predictor: LipPredictor) -> Tensor:
    """How lip codes of the training clips change with their opening, (L,): 1, then the slopes of the others."""
    clips = [dataset.labels(clip)[code_label(LipCode())] for clip in dataset.split("train") if clip.moves]
    codes = [predictor.normalise(clip.to(predictor.mean)) for clip in clips]
    centred = torch.cat([code - code.mean(0) for code in codes])
    slopes: Tensor = (centred * centred[:, :1]).sum(0) / centred[:, 0].square().sum()
    return slopes
