"""Pauses (beyond the paper): where nothing is said, so that the mouth may rest.

Even in a pause no two embeddings are alike, and noise is drawn anew for every frame, so that a face would tremble. How
far it is a pause is told by the lip codes that are heard there: in pauses they hardly change.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONTEXT = 6  # frames on either side of the one that is asked about
_SPOKEN, _SILENT = 0.22, 0.12  # mean change of a normalised lip code from frame to frame; in speech mostly 0.25 to 0.45


def pause_degree(codes: Tensor) -> float:
    """How far it is a pause around the frame whose normalised lip codes (n, L) these are: 0 in speech, 1 in silence."""
    if len(codes) < 2:
        return 0.0
    change = codes.diff(dim=0).abs().mean().item()
    return min(1.0, max(0.0, (_SPOKEN - change) / (_SPOKEN - _SILENT)))


def hushed(speech: Tensor, degree: float) -> Tensor:
    """Embeddings (n, D) as they are in speech, and their mean throughout in a full pause."""
    return torch.lerp(speech, speech.mean(dim=0), degree)
