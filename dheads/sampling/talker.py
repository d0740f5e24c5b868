"""`dheads.load`: weights, speech encoder and landmark detector, loaded once, that make any number of videos."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dheads.config import FPS, AudioCodec, Config, override
from dheads.errors import DheadsError
from dheads.extensions.codes import Track
from dheads.extensions.head_motion import bounded
from dheads.extensions.pose import PoseCode
from dheads.faces.alignment import scale_of
from dheads.faces.detection import LandmarkBackend
from dheads.faces.landmarks import load_backend
from dheads.media.containers import MAX_SECONDS, name_of
from dheads.media.hearing import Hearing, hear
from dheads.media.sound import add_noise, claimed_seconds, wav_file, waveform_pieces
from dheads.media.writing import video_writer
from dheads.sampling.engine import Engine
from dheads.sampling.jobs import Job, check_inputs
from dheads.sampling.lockstep import VideoSpec, in_lockstep
from dheads.sampling.motion_video import Repeated, motion_of
from dheads.sampling.outputs import check
from dheads.sampling.portrait import Portrait, find_portrait, notes_on_edge
from dheads.sampling.staging import staged
from dheads.speech.encoders import load_speech_encoder
from dheads.speech.interface import SpeechEncoder
from dheads.system.devices import described, resolve_device
from dheads.system.files import as_path
from dheads.system.prefetch import prefetch
from dheads.weights.checkpoints import load_model

log = logging.getLogger("dheads")
_LEAST_SIDE, _MOST_SIDE = 256, 512  # px of a video, by default, where the photo's own detail is shown
_STILL = 0.8  # share of the identity in the motion frames of a still head

Face = Path | str | np.ndarray
"""A photo, a video, or a picture (H, W, 3) uint8 RGB."""
Sound = Path | str | BinaryIO | Tensor
"""A recording, a video with sound, a stream of either, or a waveform (N,) at 16 kHz in [-1, 1]."""
OnFrame = Callable[[int, int | None], object]
"""Is given the number of frames made, and about how many there will be, if that is known."""


@dataclass(frozen=True)
class Result:
    """One finished video."""

    path: Path
    frames: int
    seconds: float  # length of the video
    sampling_seconds: float
    notes: list[str] = field(default_factory=list)  # what the user should know, such as several faces in the photo


@dataclass(frozen=True, eq=False)
class Scene:
    """What one video is generated from, and what is done to its frames."""

    video: VideoSpec  # its speech comes in chunks, once
    frames: int | None  # about how many, if the sound's container knows
    finish: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, int]  # height and width of the frames, px
    notes: list[str]

    def summary(self, steps: int) -> str:
        """What there is to do, for a message."""
        frames = "" if self.frames is None else f"{self.frames} frames, "
        return f"{self.shape[1]} x {self.shape[0]} px, {frames}{steps} denoising step{'s' * (steps > 1)} a frame"


class Talker:
    """Makes videos with one set of weights. `dheads.load` returns one."""

    def __init__(self, weights: str, device: torch.device, progress: bool = True) -> None:
        """weights: a known name or a checkpoint file. Raises DheadsError for weights that cannot be used."""
        self.unet, self.config, _ = load_model(weights, device, progress)
        self._weights, self._device, self._progress = weights, device, progress

    def sample(
        self,
        face: Face,
        audio: Sound,
        output: Path | str | BinaryIO,
        *,
        seed: int = 0,
        size: int | None = None,
        steps: int | None = None,
        solver: str | None = None,
        guidance: float | None = None,
        at: float | None = None,
        which: int | None = None,
        paste: bool = False,
        still: bool = False,
        motion: float | None = None,
        motion_from: Path | str | None = None,
        audio_codec: AudioCodec = "aac",
        compiled: bool = False,
        on_frame: OnFrame | None = None,
    ) -> Result:
        """Write to `output` a video in which the person of `face` speaks the recording `audio`.

        It is an MP4, or an M4V or MOV if the name ends so. A stream, a pipe or a device as `output` gets fragments,
        which can be played before the video ends. The same seed on the same device gives the same video. Sound is
        read while frames are generated, so hours of it take no more memory than a minute.

        size: side of the video in px, with `paste` the longest; None: the face's own in its picture, 256 to 512, or the
        network's where heads do not move. steps, solver, guidance: how frames are sampled; None: as the weights
        recommend. at: seconds into a video as face; None: its first frame with a face. which: of several faces, from
        the largest: 1. paste: the face is shown in its whole picture. still: the head keeps to its place in the photo.
        motion: how far the head moves, 0 to 2 times as far as people do; None: 1. motion_from: a video whose head
        motion and blinks are repeated. audio_codec: of the video's sound. compiled: torch.compile first, which takes a
        minute. on_frame: called after each frame with the number of frames made and about how many there will be, None
        if the sound does not say. What it raises ends the work, and nothing is written.
        Raises DheadsError for input that cannot be used; then nothing is written.
        """
        job = Job(
            _face(face), _sound(audio), as_path(output), seed=seed, size=size, steps=steps, solver=solver,
            guidance=guidance, at=at, which=which, paste=paste, still=still, motion=motion,
            motion_from=_path(motion_from), audio_codec=audio_codec,
        )  # fmt: skip
        return self.make(job, compiled, on_frame)

    def frames(
        self,
        face: Face,
        audio: Sound,
        *,
        seed: int = 0,
        size: int | None = None,
        steps: int | None = None,
        solver: str | None = None,
        guidance: float | None = None,
        at: float | None = None,
        which: int | None = None,
        paste: bool = False,
        still: bool = False,
        motion: float | None = None,
        motion_from: Path | str | None = None,
        compiled: bool = False,
    ) -> Iterator[np.ndarray]:
        """Yield the frames, (H, W, 3) uint8 RGB, 25 a second, of the video that `sample` with the same options writes.

        Raises DheadsError as `sample` does, with the first frame.
        """
        job = Job(
            _face(face), _sound(audio), Path(os.devnull), seed=seed, size=size, steps=steps, solver=solver,
            guidance=guidance, at=at, which=which, paste=paste, still=still, motion=motion,
            motion_from=_path(motion_from),
        )  # fmt: skip
        check_inputs(job)
        engine, scene = self.engine(job, compiled), self.scene(job)
        with reporting_compile_errors(compiled):
            yield from map(scene.finish, frames_of(engine, scene.video))

    def make(self, job: Job, compiled: bool = False, on_frame: OnFrame | None = None) -> Result:
        """Make the video of a job. Raises DheadsError as `sample` does."""
        check(job)
        engine, scene = self.engine(job, compiled), self.scene(job)
        log.info("make %s %s: %s", name_of(job.output), described(self._device), scene.summary(engine.sampling.steps))
        # A thread composes a frame while the network makes the next.
        frames = prefetch(scene.finish, ((frame,) for frame in frames_of(engine, scene.video)), 1)
        start = time.monotonic()
        # Closed also when writing fails, so that the error begins a line of its own.
        with (
            tqdm(frames, total=scene.frames, desc="sample", unit="frame", disable=not self._progress) as bar,
            reporting_compile_errors(compiled),
            video_writer(job.output, job.audio, audio_codec=job.audio_codec) as writer,
        ):
            for frame in bar:
                writer.add(frame)
                if on_frame is not None:
                    on_frame(writer.count, scene.frames)
        spent, notes = time.monotonic() - start, scene.notes + writer.notes
        return Result(Path(name_of(job.output)), writer.count, writer.count / FPS, spent, notes)

    @cached_property
    def backend(self) -> LandmarkBackend:
        """The landmark detector that the weights were trained with."""
        return load_backend(self.config.alignment.landmarks)

    @cached_property
    def encoder(self) -> SpeechEncoder:
        """The speech encoder that the weights were trained with."""
        return load_speech_encoder(self.config.conditioning.speech_encoder, self._device, self._progress)

    def engine(self, job: Job, compiled: bool = False) -> Engine:
        """Raises DheadsError for settings that these weights cannot take."""
        anchored = job.still and self.unet.head_motion is None
        anchor = max(_STILL, self.config.extensions.motion.anchor) if anchored else None
        try:
            config = adjusted(self.config, steps=job.steps, solver=job.solver, guidance=job.guidance, anchor=anchor)
        except DheadsError as error:
            raise DheadsError(f"{self._weights}: {error}") from error
        if config.extensions.sound.guidance != 1 and self.config.extensions.sound.dropout == 0:
            raise DheadsError(f"{self._weights}: was trained with sound only, so it takes no guidance; leave it at 1")
        return Engine(self.unet, config, compiled=compiled)

    def scene(self, job: Job) -> Scene:
        """The photo of a job, read, and its sound, begun. Raises DheadsError for what cannot be used."""
        portrait = find_portrait(job.face, self.config, self.backend, at=job.at, which=job.which)
        stage = staged(self.config, portrait, self._side(job, portrait), job.paste)
        hearing = hear(job.audio)
        seconds = claimed_seconds(job.audio, hearing)
        frames = None if seconds is None else round(seconds * FPS)
        tracks = self._tracks(job, frames)
        speech = self._speech(job.audio, hearing, seconds)
        video = VideoSpec(stage.photo, speech, job.seed, tracks=tracks, middle=stage.middle)
        name = "the given picture" if isinstance(job.face, np.ndarray) else str(job.face)
        notes = (
            portrait.notes
            if job.paste
            else [*portrait.notes, *notes_on_edge(portrait, self.config.network.image_size, name)]
        )
        return Scene(video, frames, stage.finish, stage.shape, [*notes, *hearing.notes])

    def _side(self, job: Job, portrait: Portrait) -> int | None:
        """The side of the video in px; None: of the network's frames, or of the picture that they are pasted into."""
        if job.paste or job.size is not None or not self.config.extensions.warp.flow:
            return job.size
        # The face's own resolution: a pixel of the picture becomes one of the video.
        own = self.config.network.image_size / scale_of(portrait.matrix)
        return 2 * round(min(max(own, _LEAST_SIDE), _MOST_SIDE) / 2)

    def _tracks(self, job: Job, frames: int | None) -> dict[str, Track]:
        """The tracks of head and eyes where the job says how they move. frames: of the video, if known."""
        head = self.unet.head_motion
        if head is None:
            if job.motion is None and job.motion_from is None:
                return {}
            raise DheadsError(
                f"{self._weights}: was trained without extensions.codes.pose, so its head cannot be moved; leave out "
                "--motion and --motion-from"
            )
        scale = job.motion
        if scale is None:
            scale = 0.0 if job.still else 1.0
        if job.motion_from is None:
            return {PoseCode.name: head.track(job.seed, scale)}
        measured = motion_of(job.motion_from, self.config, self.backend, frames)
        measured[PoseCode.name] = bounded(scale * measured[PoseCode.name])
        codes = [code for code in self.unet.codes if code.name in measured]
        return {code.name: Repeated(code.normalised(measured[code.name], self.unet.fitted(code))) for code in codes}

    def _speech(self, audio: Path | BinaryIO, hearing: Hearing, seconds: float | None) -> Iterator[Tensor]:
        """Embeddings in chunks (f, D), begun, so that a fault of the sound shows before the video is begun."""
        if seconds is not None and seconds > MAX_SECONDS:
            # Nobody wants to hear of it after hours of work, but the claim may be wrong: read it all.
            deque(waveform_pieces(audio, hearing), maxlen=0)
        chunks = self.hear(waveform_pieces(audio, hearing))
        return chain([next(chunks)], chunks)

    def hear(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """16 kHz sound in pieces (n,) -> embeddings in chunks (f, D) on the CPU, as these weights need them."""
        heard = add_noise(pieces, self.config.extensions.sound.room_noise)
        return (chunk.cpu() for chunk in self.encoder.encode_pieces(heard))


def load(weights: str = "small", device: str = "auto", progress: bool = True) -> Talker:
    """Weights of a known name or a checkpoint file, ready to make videos.

    device: auto (CUDA, else MPS, else the CPU), cpu, cuda or mps. progress: bars on stderr.
    Raises DheadsError for weights that cannot be used, and for a device that is not there.
    """
    return Talker(weights, resolve_device(device), progress)


def sample_job(job: Job, *, device: str = "auto", compiled: bool = False, progress: bool = True) -> Result:
    """Make the video of one job. Raises DheadsError as `Talker.sample` does, before weights are loaded where it can."""
    check(job)
    return load(job.weights, device, progress).make(job, compiled)


def adjusted(
    config: Config,
    *,
    steps: int | None = None,
    solver: str | None = None,
    guidance: float | None = None,
    anchor: float | None = None,
) -> Config:
    """The weights' own configuration, with those ways of sampling that are given."""
    sampling = {"steps": steps, "solver": solver}
    changes = {name: value for name, value in sampling.items() if value is not None}
    sound = {} if guidance is None else {"guidance": guidance}
    motion = {} if anchor is None else {"anchor": anchor}
    return override(config, {"sampling": changes, "extensions": {"sound": sound, "motion": motion}})


def generate(
    engine: Engine,
    photo: np.ndarray,
    speech: Tensor | Iterable[Tensor],
    *,
    seed: int = 0,
    codes: Mapping[str, Tensor] | None = None,
) -> Iterator[np.ndarray]:
    """Yield the frames, (H, W, 3) uint8, of the aligned `photo` (H, W, 3) speaking `speech` (paper section 3.5).

    speech: embeddings (F, D), or chunks (f, D) of them. codes: normalised codes (F, C) by name, instead of those that
    are predicted.
    """
    yield from frames_of(engine, VideoSpec(photo, speech, seed, codes or {}))


def frames_of(engine: Engine, video: VideoSpec) -> Iterator[np.ndarray]:
    """Yield the frames, (H, W, 3) uint8, of one video."""
    for _, frame, _ in in_lockstep(engine, [video]):
        yield frame


@contextmanager
def reporting_compile_errors(compiled: bool) -> Iterator[None]:
    """Turn errors of torch.compile into one sentence."""
    if not compiled:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # takes a second to load

    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise DheadsError(f"torch.compile fails here ({reason}); install a C++ compiler, or do not compile") from error


def _face(face: Face) -> Path | np.ndarray:
    return face if isinstance(face, np.ndarray) else Path(face)


def _path(path: Path | str | None) -> Path | None:
    return None if path is None else Path(path)


def _sound(audio: Sound) -> Path | BinaryIO:
    if isinstance(audio, Tensor):
        return wav_file(audio)
    return Path(audio) if isinstance(audio, str) else audio
