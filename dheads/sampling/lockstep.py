"""Many videos at once: their frames go through the network together, and each video keeps to itself.

Speech may come in chunks while frames are generated: only what a frame needs of it is held.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dheads.conditioning import Cues, MotionBuffer, window
from dheads.config import CodeConfig
from dheads.errors import DheadsError
from dheads.extensions.codes import Code, Track
from dheads.extensions.lips import LipCode, LipTrack
from dheads.extensions.motion import as_motion_frame, pose_of, rested
from dheads.extensions.pauses import CONTEXT, hushed, pause_degree
from dheads.media.pixels import to_uint8, to_unit
from dheads.sampling.calibration import LipGains, amplified
from dheads.sampling.engine import Engine, Inputs
from dheads.sampling.layers import layers
from dheads.system.prefetch import prefetch
from dheads.system.workers import cores

Finished = TypeVar("Finished")


@dataclass(frozen=True, eq=False)
class VideoSpec:
    """What one video is generated from."""

    photo: np.ndarray  # (H, W, 3) uint8, aligned
    speech: Tensor | Iterable[Tensor]  # (F, D) one embedding a frame, or chunks (f, D) of them
    seed: int = 0
    codes: Mapping[str, Tensor] = field(default_factory=dict)  # (F, C) normalised, instead of those predicted
    tracks: Mapping[str, Track] = field(default_factory=dict)  # instead of the codes' own
    # (S, S, 3) uint8, the same photo at the size of layers: frames come as layers then, for networks that move it
    middle: np.ndarray | None = None


def in_lockstep(
    engine: Engine, videos: Iterable[VideoSpec], slots: int = 1, stopped: Container[int] = ()
) -> Iterator[tuple[int, np.ndarray, bool]]:
    """Yield (index of the video, its next frame, whether it is the last one), `slots` videos at once (paper section
    3.5). A frame is (H, W, 3) uint8, or layers (S, S, 7) float32 of a video with `middle`.

    A video is taken from the iterable when a slot is free; a video's frames come in order. Each has random numbers of
    its own: other videos of its batch change its pixels by no more than the device's rounding does.
    stopped: indices to which the caller may add; such a video gets no further frame, and its slot is free.
    """
    waiting, gains = enumerate(videos), LipGains(engine, slots)
    active: list[_Slot] = []
    arriving: list[_Arrival] = []
    while True:
        while len(active) < slots and (video := next(waiting, None)) is not None:
            slot = _Slot(engine, *video, gains)
            active += [slot] if slot.goes_on else []
        if not active and not arriving:
            return
        begun = [_generate(engine, group, slots) for group in _groups(engine, active)]
        # The last frames are copied and encoded while these are computed.
        if engine.records:
            begun, arriving = arriving, begun
        for arrival in begun:
            yield from (frame for frame in arrival.frames() if frame[0] not in stopped)
        active = [slot for slot in active if slot.goes_on and slot.index not in stopped]


def composed(
    frames: Iterable[tuple[int, np.ndarray, bool]], finish: Callable[[int, np.ndarray], Finished]
) -> Generator[tuple[int, Finished, bool]]:
    """What `in_lockstep` yields, each frame finished by threads while the network makes the next.

    finish: makes the frame of the video of an index.
    """

    def finished(index: int, frame: np.ndarray, last: bool) -> tuple[int, Finished, bool]:
        return index, finish(index, frame), last

    return prefetch(finished, frames, max(1, cores() // 2))


class _Slot:
    """One video while it is generated."""

    def __init__(self, engine: Engine, index: int, video: VideoSpec, gains: LipGains) -> None:
        config, unet, device = engine.config, engine.unet, engine.device
        self.index, self._engine, self._frame, self._given = index, engine, 0, video.codes
        codes = config.extensions.codes
        self._tracks = {
            code.name: video.tracks.get(code.name)
            or code.track(unet.fitted(code), video.seed, codes[code.name].event_rate)
            for code in unet.codes
        }
        reach = max([0, *(codes[name].context + track.reach for name, track in self._tracks.items() if track.reach)])
        if isinstance(lips := self._tracks.get("lips"), LipTrack):
            reach = max(reach, CONTEXT + lips.reach)
        self._lips = lips if isinstance(lips, LipTrack) else None
        self._speech = _SpeechWindow(video.speech, max(config.conditioning.audio_context, reach))
        # The generator lives on the CPU, so that a seed means the same noise on every device.
        self._generator = torch.Generator().manual_seed(video.seed)
        self.identity = to_unit(video.photo)[None].to(device)  # (1, 3, H, W)
        self.middle = None if video.middle is None else to_unit(video.middle)[None].to(device)  # (1, 3, S, S)
        hears = self._lips is not None and LipCode.name not in video.codes
        self._lip_gain = gains(self.identity) if hears else 1.0
        self._x_T: Tensor | None = None  # (1, 1, 3, H, W) of the last frame
        self._rest = 0.0  # how far the current frame is in a pause
        self.cues: Cues  # of the current frame, B = 1
        self._buffer = MotionBuffer(self.identity, config.conditioning.motion_frames)

    @property
    def is_new(self) -> bool:
        """Whether it has no frame yet."""
        return self._frame == 0

    @property
    def goes_on(self) -> bool:
        return self._speech.reaches(self._frame)

    def inputs(self) -> Inputs:
        """Of the next frame, B = 1."""
        motion_frames = self._buffer.stacked()
        speech, at = self._speech.around(self._frame)
        self._rest = self._pause(speech, at)
        calm = hushed(speech, self._rest) if self._rest else speech
        noisy = self._engine.extensions.motion.noise > 0
        audio_window = window(calm, at, self._engine.config.conditioning.audio_context)
        self.cues = Cues(audio_window, self._codes(speech, calm, at)).map(lambda value: self._sent(value[None]))
        return Inputs(
            self.identity,
            motion_frames,
            self.cues,
            self._random(motion_frames.shape) if noisy else None,
            self._noise(),
        )

    def _pause(self, speech: Tensor, at: int) -> float:
        """How far it is a pause around the frame, if pauses are treated differently."""
        if self._lips is None or not self._engine.extensions.noise.pause_shared:
            return 0.0
        return pause_degree(self._lips.codes(speech)[max(0, at - CONTEXT) : at + CONTEXT + 1])

    def _codes(self, speech: Tensor, calm: Tensor, at: int) -> dict[str, Tensor]:
        """The window (2 context + 1, C) of each code: as given, or by its track. calm: the speech as the mouth hears
        it, at rest in pauses."""
        tables = self._engine.config.extensions.codes
        return {
            code.name: window(self._given[code.name], self._frame, tables[code.name].context)
            if code.name in self._given
            else self._predicted(code, calm if code.is_heard else speech, at, tables[code.name])
            for code in self._engine.unet.codes
        }

    def _predicted(self, code: Code, speech: Tensor, at: int, table: CodeConfig) -> Tensor:
        codes = self._tracks[code.name].window(self._frame, speech, at, table.context)
        return amplified(codes, self._lip_gain) if code.name == LipCode.name else table.gain * codes

    def _noise(self) -> Tensor:
        """(1, N, 3, H, W): x_T, which a frame shares with the one before, and what the solver adds."""
        fresh = self._random((1, self._engine.noises, *self.identity.shape[1:]))
        noise, self._x_T = self._engine.frame_noise(fresh, self._x_T, self._rest)
        return noise

    def push(self, x_0: Tensor) -> None:
        """Take in the finished frame (1, 3, H, W)."""
        frame = as_motion_frame(self._engine.config, x_0, self.identity, self.cues)
        self._buffer.push(rested(frame, self._buffer.stacked(), self._rest))
        self._frame += 1

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return self._sent(torch.randn(shape, generator=self._generator))

    def _sent(self, value: Tensor) -> Tensor:
        """On the device, without waiting for what it is doing."""
        if self._engine.device.type == "cuda":
            return value.pin_memory().to(self._engine.device, non_blocking=True)
        return value.to(self._engine.device)


class _SpeechWindow:
    """Embeddings around one frame after the other: only those are held, and what is read with them."""

    def __init__(self, speech: Tensor | Iterable[Tensor], reach: int) -> None:
        """speech: (F, D), or chunks (f, D) of it. reach: frames held on either side."""
        self._chunks = iter([speech] if isinstance(speech, Tensor) else speech)
        self._reach = reach
        self._held = torch.empty(0)  # (n, D)
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
        """Read on until that frame or the end; returns the number of frames read."""
        while (end := self._begin + len(self._held)) <= frame:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._held = torch.cat([self._held, chunk]) if len(self._held) else chunk
        return end


class _Arrival:
    """Frames on their way from the device."""

    def __init__(self, frames: list[Tensor], labels: list[tuple[int, bool]]) -> None:
        """frames: (1, 3, H, W), or layers; labels: of each, the index of its video and whether this is its last."""
        on_cuda = frames[0].device.type == "cuda"
        self._labels = labels
        # In the same direction and as little waited for as the pixels, which would hide it.
        broken = torch.stack([frame.isnan().any() for frame in frames]).any()
        self._broken = broken.to("cpu", non_blocking=on_cuda)
        pixels = [to_uint8(frame) if frame.shape[1] == 3 else frame for frame in frames]
        self._pixels = [values.to("cpu", non_blocking=on_cuda) for values in pixels]
        self._there = torch.cuda.current_stream().record_event() if on_cuda else None

    def frames(self) -> Iterator[tuple[int, np.ndarray, bool]]:
        """(index of the video, (H, W, 3) uint8 or layers (S, S, 7) float32, whether it is the last one)."""
        if self._there is not None:
            self._there.synchronize()
        if self._broken:
            raise DheadsError(
                "the network gave numbers that are not finite; leave out --compile, choose other weights, or another "
                "--device"
            )
        for (index, last), pixels in zip(self._labels, self._pixels, strict=True):
            yield index, pixels[0].numpy(), last


def _groups(engine: Engine, slots: list[_Slot]) -> list[list[_Slot]]:
    """Slots that go through the network together: first frames take more steps where the others start warm."""
    if not engine.warms:
        return [slots] if slots else []
    groups = [[slot for slot in slots if slot.is_new], [slot for slot in slots if not slot.is_new]]
    return [group for group in groups if group]


@torch.inference_mode()
def _generate(engine: Engine, group: list[_Slot], count: int) -> _Arrival:
    # A CUDA graph has one batch size: free slots repeat the first.
    spare = count - len(group) if engine.records else 0
    each = [slot.inputs() for slot in group]
    x_0 = engine.generate(Inputs.cat(each + each[:1] * spare), first=group[0].is_new)[: len(group)]
    shown = _shown(engine, group, x_0)
    for slot, frame in zip(group, x_0.split(1), strict=True):
        slot.push(frame)
    return _Arrival(shown, [(slot.index, not slot.goes_on) for slot in group])


def _shown(engine: Engine, group: list[_Slot], x_0: Tensor) -> list[Tensor]:
    """What is shown of the frames (B, 3, H, W): as they are, (1, 3, H, W), or as layers (1, S, S, 7)."""
    shown = list(x_0.split(1))
    larger = [number for number, slot in enumerate(group) if slot.middle is not None]
    if not larger or engine.taken is None:
        return shown
    slots = [group[number] for number in larger]
    photos = torch.cat([slot.identity for slot in slots])
    middles = torch.cat([slot.middle for slot in slots if slot.middle is not None])
    pose = pose_of(engine.config, Cues.cat([slot.cues for slot in slots]))
    cut = layers(x_0[larger], engine.taken.of(larger), photos, middles, engine.mouth, engine.config.alignment, pose)
    for number, frame in zip(larger, cut.split(1), strict=True):
        shown[number] = frame
    return shown
