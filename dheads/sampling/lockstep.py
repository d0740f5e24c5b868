"""Many videos at once: their frames go through the network together, and each video keeps to itself.

Speech may come in chunks while frames are made: no more of it is held than a frame is told of.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from dheads.conditioning import MotionBuffer, window
from dheads.errors import DheadsError
from dheads.extensions.blinks import Blinks
from dheads.extensions.pauses import CONTEXT, hushed, pause_degree
from dheads.media.pixels import to_uint8, to_unit
from dheads.sampling.engine import Engine, Inputs


@dataclass(frozen=True, eq=False)
class Talk:
    """What one video is made from."""

    photo: np.ndarray  # (H, W, 3) uint8, aligned
    speech: Tensor | Iterable[Tensor]  # (F, D) one embedding a frame, or chunks (f, D) of them
    seed: int = 0
    lips: Tensor | None = None  # (F, L) normalised lip codes in place of those predicted from the speech
    eyes: Tensor | None = None  # (F, 1) eye codes in place of blinks by chance


def perform(
    engine: Engine, talks: Iterable[Talk], places: int = 1, stopped: Container[int] = ()
) -> Iterator[tuple[int, np.ndarray, bool]]:
    """Yield (index of the talk, its next frame (H, W, 3) uint8, whether it is the last one), `places` talks in
    lock-step (paper section 3.5).

    A talk is taken from the iterable when a place is free; a talk's frames come in order. Each has its own random
    numbers: what shares its batch changes its pixels by no more than the device's rounding does.
    stopped: indices to which the caller may add; such a talk gets no further frame, and its place is free.
    """
    waiting = enumerate(talks)
    stage: list[_Place] = []
    arriving: list[_Arrival] = []
    while True:
        while len(stage) < places and (talk := next(waiting, None)) is not None:
            place = _Place(engine, *talk)
            stage += [place] if place.goes_on else []
        if not stage and not arriving:
            return
        begun = [_draw(engine, group, places) for group in _groups(engine, stage)]
        # The last frames are copied and encoded while these are computed.
        if engine.records:
            begun, arriving = arriving, begun
        for arrival in begun:
            yield from (told for told in arrival.frames() if told[0] not in stopped)
        stage = [place for place in stage if place.goes_on and place.index not in stopped]


class _Place:
    """One talk in the making."""

    def __init__(self, engine: Engine, index: int, talk: Talk) -> None:
        config, device = engine.config, engine.device
        told = config.conditioning
        self.index, self._engine, self._frame = index, engine, 0
        self._eyes = talk.eyes
        self._blinks = Blinks(talk.seed, engine.sampling.blink_rate) if told.eye_dims else None
        self._lips, self._predictor, reach = talk.lips, None, told.audio_context
        if engine.unet.lips is not None:
            self._predictor = copy.deepcopy(engine.unet.lips).cpu()  # a trifle to compute, beside the speech
            reach = max(reach, max(told.lip_context, CONTEXT) + self._predictor.context)
        self._speech = _Passing(talk.speech, reach)
        # The generator lives on the CPU, so that a seed means the same noise on every device.
        self._generator = torch.Generator().manual_seed(talk.seed)
        self._identity = to_unit(talk.photo)[None].to(device)  # (1, 3, H, W)
        self._x_T: Tensor | None = None  # (1, 1, 3, H, W) of the last frame
        self._rest = 0.0  # how far the frame at hand is in a pause
        self._buffer = MotionBuffer(self._identity, told.motion_frames, engine.sampling.identity_anchor)

    @property
    def fresh(self) -> bool:
        return self._frame == 0

    @property
    def goes_on(self) -> bool:
        return self._speech.reaches(self._frame)

    def inputs(self) -> Inputs:
        """Of the next frame, B = 1."""
        told, motion_frames = self._engine.config.conditioning, self._buffer.stacked()
        noisy = told.motion_noise > 0
        speech, at = self._speech.around(self._frame)
        codes = None if self._predictor is None else self._predictor.predict(speech)
        self._rest = pause = self._pause(codes, at)
        if pause:
            speech = hushed(speech, pause)
            codes = self._predictor.predict(speech)
        return Inputs(
            self._identity,
            motion_frames,
            self._sent(window(speech, at, told.audio_context)[None]),
            self._lip_window(codes, at),
            self._random(motion_frames.shape) if noisy else None,
            self._noise(pause),
            self._eye_window(),
        )

    def _pause(self, codes: Tensor | None, at: int) -> float:
        """How far it is a pause around the frame, where pauses are told apart."""
        if codes is None or not self._engine.sampling.pause_shared_noise:
            return 0.0
        return pause_degree(codes[max(0, at - CONTEXT) : at + CONTEXT + 1])

    def _noise(self, pause: float) -> Tensor:
        """(1, N, 3, H, W): x_T, which a frame shares with the one before, and what the solver adds."""
        fresh = self._random((1, self._engine.draws, *self._identity.shape[1:]))
        noise, self._x_T = self._engine.frame_noise(fresh, self._x_T, pause)
        return noise

    def _eye_window(self) -> Tensor | None:
        context = self._engine.config.conditioning.eye_context
        if self._blinks is None:
            return None
        if self._eyes is not None:
            return self._sent(window(self._eyes, self._frame, context)[None])
        return self._sent(self._blinks.window(self._frame, context)[None])

    def _lip_window(self, codes: Tensor | None, at: int) -> Tensor | None:
        """(1, A', L), as given or of the codes (n, L) that are predicted from the speech around the frame."""
        context = self._engine.config.conditioning.lip_context
        if self._lips is not None:
            return self._sent(window(self._lips, self._frame, context)[None])
        return None if codes is None else self._sent(window(codes, at, context)[None])

    def push(self, x_0: Tensor) -> None:
        self._buffer.push(x_0, self._rest)
        self._frame += 1

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return self._sent(torch.randn(shape, generator=self._generator))

    def _sent(self, value: Tensor) -> Tensor:
        """On the device, without waiting for what it is doing."""
        if self._engine.device.type == "cuda":
            return value.pin_memory().to(self._engine.device, non_blocking=True)
        return value.to(self._engine.device)


class _Passing:
    """Embeddings as they pass: only those around one frame are held, and what is read with them."""

    def __init__(self, speech: Tensor | Iterable[Tensor], reach: int) -> None:
        """speech: (F, D), or chunks (f, D) of it. reach: frames held on either side."""
        self._chunks = iter([speech] if isinstance(speech, Tensor) else speech)
        self._reach = reach
        self._held: Tensor | None = None  # (n, D)
        self._begin = 0  # the frame of its first row

    def reaches(self, frame: int) -> bool:
        """Whether there is that frame."""
        return self._read(frame) > frame

    def around(self, frame: int) -> tuple[Tensor, int]:
        """The embeddings (n, D) of the frames at most `reach` away, as far as there are any, and which is the frame's.

        What comes before is forgotten, so frames are asked for in order.
        """
        end = min(self._read(frame + self._reach), frame + self._reach + 1)
        begin = max(0, frame - self._reach)
        self._held, self._begin = self._held[begin - self._begin :], begin
        return self._held[: end - begin], frame - begin

    def _read(self, frame: int) -> int:
        """Read on until that frame or the end; returns how far we are."""
        while (end := self._begin + (0 if self._held is None else len(self._held))) <= frame:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._held = chunk if self._held is None else torch.cat([self._held, chunk])
        return end


class _Arrival:
    """Frames on their way from the device."""

    def __init__(self, x_0: Tensor, labels: list[tuple[int, bool]]) -> None:
        """x_0 (B, 3, H, W); labels: (index of the talk, whether this is its last frame) of those that count."""
        on_cuda = x_0.device.type == "cuda"
        self._labels = labels
        # In the same direction and as little waited for as the pixels, which would hide it.
        self._broken = x_0.isnan().any().to("cpu", non_blocking=on_cuda)
        self._pixels = to_uint8(x_0).to("cpu", non_blocking=on_cuda)
        self._there = torch.cuda.current_stream().record_event() if on_cuda else None

    def frames(self) -> Iterator[tuple[int, np.ndarray, bool]]:
        """(index of the talk, (H, W, 3) uint8, whether it is the last one)."""
        if self._there is not None:
            self._there.synchronize()
        if self._broken:
            raise DheadsError(
                "the network gave numbers that are not finite; leave out --compile, choose other weights, or another "
                "--device"
            )
        for (index, last), picture in zip(self._labels, self._pixels.numpy(), strict=False):
            yield index, picture, last


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
    return _Arrival(x_0, [(place.index, not place.goes_on) for place in group])


def _stacked(each: list[Inputs]) -> Inputs:
    columns = ([getattr(inputs, field.name) for inputs in each] for field in fields(Inputs))
    return Inputs(*(None if values[0] is None else torch.cat(values) for values in columns))
