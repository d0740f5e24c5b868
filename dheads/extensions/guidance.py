"""Classifier-free guidance by the sound (Ho & Salimans 2022), and the absence of sound that it needs.

Why: at 1.5 mouths open 1.2 times as wide and follow with 0.61 in place of 0.56 (weights trained without sound and lip
code at times; those trained without the sound alone open wider, and follow no better).
Off: extensions.sound.guidance = 1 and extensions.sound.dropout = 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from dheads.conditioning import Condition, Cues
from dheads.diffusion import Denoise, Denoised
from dheads.extensions.codes import CODES
from dheads.extensions.motion import MotionCondition

AnyCondition = TypeVar("AnyCondition", bound=Condition)


def silenced(condition: AnyCondition, keep: Tensor) -> AnyCondition:
    """The same without sound where `keep` (B,) is 0, neither as embeddings nor as codes that follow from it."""
    keep = keep.to(condition.cues.audio_window)[:, None, None]
    codes = {name: code * keep if CODES[name].is_heard else code for name, code in condition.cues.codes.items()}
    return replace(condition, cues=Cues(condition.cues.audio_window * keep, codes))


def with_and_without_sound(condition: MotionCondition) -> MotionCondition:
    """One batch: the condition, then the same without sound."""
    silent = silenced(condition, torch.zeros(len(condition.identity), device=condition.identity.device))
    level, photo = condition.motion_noise, condition.photo
    return MotionCondition(
        torch.cat([condition.identity, silent.identity]),
        torch.cat([condition.motion_frames, silent.motion_frames]),
        Cues.cat([condition.cues, silent.cues]),
        None if level is None else torch.cat([level, level]),
        None if photo is None else photo.map(lambda value: torch.cat([value, value])),
    )


def guided(denoise: Denoise, guidance: float) -> Denoise:
    """denoise: of a condition with and without sound, as one batch (2B). Takes and returns B."""

    def both(x_t: Tensor, t: int) -> Denoised:
        joint = denoise(torch.cat([x_t, x_t]), t)
        heard, unheard = joint.x_0.chunk(2)
        var_frac = None if joint.var_frac is None else joint.var_frac.chunk(2)[0]
        # x_0 = x_0(no sound) + g (x_0(sound) - x_0(no sound))
        return Denoised(torch.lerp(unheard, heard, guidance), var_frac)

    return both
