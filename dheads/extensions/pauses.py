"""Pauses: where nobody speaks, the mouth rests.

Even in a pause no two embeddings are alike, and every frame has noise of its own, so that a face would tremble. A pause
shows in the lip codes that are predicted there: they hardly change. In it the speech is averaged, x_T is shared with
the frame before (noise.py), and half of the last motion frame is blended into the next (motion.py).
Why: in a pause mouths moved by 0.64 to 0.93 of what they move in speech, and now by 0.03 to 0.2.
Off: extensions.noise.pause_shared = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONTEXT = 6  # frames on either side that are looked at
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
