"""How far a face opens its mouth for a lip code: found out on trial frames, and corrected by a gain of its own.

A network follows the lip code more closely on some faces than on others: a mouth that smiles or is seen from the side
may open by a third of what it is given. A few first frames with known codes show the slope of the shown opening over
the given one, and so the gain that brings it nearer to extensions.codes.lips.shown.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from dheads.conditioning import Cues, MotionBuffer, window
from dheads.extensions.lips import LipCode
from dheads.faces.alignment import mouth_opening
from dheads.faces.landmarks import load_backend
from dheads.media.pixels import to_uint8
from dheads.sampling.engine import Engine, Inputs

# Slopes of videos grow like gain^0.64, but trials foretell them only with a correlation of 0.5: with this exponent the
# slopes of 23 photos differ least.
_EXPONENT = 0.75
_LEAST, _MOST = 0.6, 5.0  # gains
_USUAL = 2.5  # standard deviations: amplified codes stay below, since mouths tear at codes beyond those of training


class LipGains:
    """The gain of the lip code for each face, found once: the videos of a list often show the same one."""

    def __init__(self, engine: Engine, slots: int) -> None:
        """slots: frames that the engine makes at once."""
        self._engine, self._slots = engine, slots
        self._found: dict[bytes, float] = {}  # by the hash of the face's pixels

    def __call__(self, identity: Tensor) -> float:
        """The gain for a face, identity (1, 3, H, W)."""
        face = hashlib.sha256(identity.cpu().numpy().tobytes()).digest()
        if face not in self._found:
            self._found[face] = lip_gain(self._engine, identity, self._slots)
        return self._found[face]


def lip_gain(engine: Engine, identity: Tensor, slots: int) -> float:
    """The gain of the lip code for a face, identity (1, 3, H, W). slots: frames that the engine makes at once."""
    table, predictor = engine.config.extensions.codes[LipCode.name], engine.unet.lip_predictor
    assert predictor is not None
    if not table.shown or not predictor.trials.any():
        return table.gain
    trials = predictor.trials  # (T, A, D)
    # Predictions reach less far than a trial, so those of the middles do not mix.
    codes = predictor.predict(trials.flatten(0, 1)).unflatten(0, trials.shape[:2])  # (T, A, L)
    given = (codes[:, trials.shape[1] // 2, 0] * predictor.std[0]).cpu().numpy()  # but for a constant
    inputs = [_inputs(engine, identity, *trial) for trial in zip(trials, codes, strict=True)]
    shown = _openings(engine, identity, _frames(engine, inputs, slots))
    if not np.isfinite(shown).all():
        return table.gain  # no face is found
    slope = max(float(np.polyfit(given, shown, 1)[0]), 1e-3)
    return float(np.clip((table.shown / slope) ** _EXPONENT, _LEAST, _MOST))


def amplified(codes: Tensor, gain: float) -> Tensor:
    """Lip codes (..., L) by a gain; large ones grow less, and none beyond what is usual unless it was there before."""
    larger = _USUAL * torch.tanh(gain * codes.abs() / _USUAL)
    return codes.sign() * (larger if gain < 1 else torch.maximum(larger, codes.abs()))


def _inputs(engine: Engine, identity: Tensor, speech: Tensor, lips: Tensor) -> Inputs:
    """Of a first frame (B = 1) in the middle of the speech (A, D) with lip codes (A, L): eyes open, the head still."""
    config, device = engine.config, engine.device
    middle, tables = len(speech) // 2, config.extensions.codes
    codes = {
        code.name: torch.zeros(1, 2 * tables[code.name].context + 1, code.dims, device=device)
        for code in engine.unet.codes
    }
    context = tables[LipCode.name].context
    codes[LipCode.name] = window(lips, middle, context)[None]
    cues = Cues(window(speech, middle, config.conditioning.audio_context)[None], codes)
    motion_frames = MotionBuffer(identity, config.conditioning.motion_frames).stacked()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, engine.noises, *identity.shape[1:]), generator=generator).to(device)
    eps = torch.randn(motion_frames.shape, generator=generator).to(device)
    return Inputs(identity, motion_frames, cues, eps if config.extensions.motion.noise > 0 else None, noise)


def _frames(engine: Engine, inputs: list[Inputs], slots: int) -> list[np.ndarray]:
    """Their frames (H, W, 3) uint8, in batches of the one size that the engine has recorded or compiled."""
    frames = []
    for begin in range(0, len(inputs), slots):
        batch = inputs[begin : begin + slots]
        spare = slots - len(batch) if engine.records else 0
        x_0 = engine.generate(Inputs.cat(batch + batch[:1] * spare), first=True)[: len(batch)]
        frames += list(to_uint8(x_0).cpu().numpy())
    return frames


def _openings(engine: Engine, identity: Tensor, frames: list[np.ndarray]) -> np.ndarray:
    """The openings of the mouth (T,) in frames of a face, in eye distances; NaN where it is not seen."""
    photo = to_uint8(identity)[0].cpu().numpy()
    landmarks = load_backend(engine.config.alignment.landmarks).track([photo, *frames])
    return mouth_opening(landmarks[1:])
