"""Many videos at once: their frames go through the network together, and each video keeps to itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from dheads.blinks import Blinks
from dheads.conditioning import MotionBuffer, window
from dheads.engine import Engine, Inputs
from dheads.video import to_uint8, to_unit


@dataclass(frozen=True, eq=False)
class Talk:
    """What one video is made from."""

    photo: np.ndarray  # (H, W, 3) uint8, aligned
    speech: Tensor  # (F, D) one embedding a frame
    seed: int = 0
    lips: Tensor | None = None  # (F, L) normalised lip codes in place of those predicted from the speech
    eyes: Tensor | None = None  # (F, 1) eye codes in place of blinks by chance


def perform(engine: Engine, talks: Iterable[Talk], places: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index of the talk, its next frame (H, W, 3) uint8), `places` talks in lock-step (paper section 3.5).

    A talk is taken from the iterable when a place is free; a talk's frames come in order. Each has its own random
    numbers: what shares its batch changes its pixels by no more than the device's rounding does.
    """
    waiting = enumerate(talks)
    stage: list[_Place] = []
    arriving: list[tuple[list[_Place], _Arrival]] = []
    while True:
        while len(stage) < places and (talk := next(waiting, None)) is not None:
            place = _Place(engine, *talk)
            stage += [place] if place.goes_on else []
        if not stage and not arriving:
            return
        begun = [(group, _draw(engine, group, places)) for group in _groups(engine, stage)]
        # The last frames are copied and encoded while these are computed.
        if engine.records:
            begun, arriving = arriving, begun
        for group, arrival in begun:
            yield from zip((place.index for place in group), arrival.pictures(), strict=False)
        stage = [place for place in stage if place.goes_on]


class _Place:
    """One talk in the making."""

    def __init__(self, engine: Engine, index: int, talk: Talk) -> None:
        config, device = engine.config, engine.device
        self.index, self._engine, self._frame = index, engine, 0
        self._speech, self._lips, self._eyes = talk.speech, talk.lips, talk.eyes
        self._blinks = Blinks(talk.seed) if config.conditioning.eye_dims else None
        if engine.unet.lips is not None and talk.lips is None:
            with torch.inference_mode():
                self._lips = engine.unet.lips.predict(talk.speech.to(device)).cpu()
        # The generator lives on the CPU, so that a seed means the same noise on every device.
        self._generator = torch.Generator().manual_seed(talk.seed)
        self._identity = to_unit(talk.photo)[None].to(device)  # (1, 3, H, W)
        self._buffer = MotionBuffer(self._identity, config.conditioning.motion_frames, engine.sampling.identity_anchor)

    @property
    def fresh(self) -> bool:
        return self._frame == 0

    @property
    def goes_on(self) -> bool:
        return self._frame < len(self._speech)

    def inputs(self) -> Inputs:
        """Of the next frame, B = 1."""
        told, motion_frames = self._engine.config.conditioning, self._buffer.stacked()
        noisy = told.motion_noise > 0
        return Inputs(
            self._identity,
            motion_frames,
            self._sent(window(self._speech, self._frame, told.audio_context)[None]),
            None if self._lips is None else self._sent(window(self._lips, self._frame, told.lip_context)[None]),
            self._random(motion_frames.shape) if noisy else None,
            self._random((1, self._engine.draws, *self._identity.shape[1:])),
            self._eye_window(),
        )

    def _eye_window(self) -> Tensor | None:
        context = self._engine.config.conditioning.eye_context
        if self._blinks is None:
            return None
        if self._eyes is not None:
            return self._sent(window(self._eyes, self._frame, context)[None])
        return self._sent(self._blinks.window(self._frame, context)[None])

    def push(self, x_0: Tensor) -> None:
        self._buffer.push(x_0)
        self._frame += 1

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return self._sent(torch.randn(shape, generator=self._generator))

    def _sent(self, value: Tensor) -> Tensor:
        """On the device, without waiting for what it is doing."""
        if self._engine.device.type == "cuda":
            return value.pin_memory().to(self._engine.device, non_blocking=True)
        return value.to(self._engine.device)


class _Arrival:
    """Frames on their way from the device."""

    def __init__(self, x_0: Tensor) -> None:
        on_cuda = x_0.device.type == "cuda"
        self._pixels = to_uint8(x_0).to("cpu", non_blocking=on_cuda)
        self._there = torch.cuda.current_stream().record_event() if on_cuda else None

    def pictures(self) -> np.ndarray:
        """(B, H, W, 3) uint8."""
        if self._there is not None:
            self._there.synchronize()
        return self._pixels.numpy()


def _groups(engine: Engine, stage: list[_Place]) -> list[list[_Place]]:
    """Places that take a step together: first frames are made in more steps where the others start warm."""
    if not engine.warms:
        return [stage] if stage else []
    groups = [[p for p in stage if p.fresh], [p for p in stage if not p.fresh]]
    return [group for group in groups if group]


@torch.inference_mode()
def _draw(engine: Engine, group: list[_Place], places: int) -> _Arrival:
    # A CUDA graph has one batch size: places that are free repeat the first.
    spare = places - len(group) if engine.records else 0
    each = [place.inputs() for place in group]
    x_0 = engine.draw(_stacked(each + each[:1] * spare), first=group[0].fresh)
    for place, frame in zip(group, x_0.split(1), strict=False):
        place.push(frame)
    return _Arrival(x_0)


def _stacked(each: list[Inputs]) -> Inputs:
    columns = ([getattr(inputs, field.name) for inputs in each] for field in fields(Inputs))
    return Inputs(*(None if values[0] is None else torch.cat(values) for values in columns))
