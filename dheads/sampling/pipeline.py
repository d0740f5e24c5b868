"""`dheads sample`: one face and one recording to a talking-head video, and lists of such jobs."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dheads.config import FPS, Config, SamplingConfig
from dheads.errors import DheadsError
from dheads.faces.alignment import align_transforms, beyond_edge, framed
from dheads.faces.landmarks import LandmarkBackend, find_face, in_view, load_backend
from dheads.faces.paste import Paster
from dheads.media.containers import MAX_SECONDS, name_of, opened
from dheads.media.hearing import Hearing, hear
from dheads.media.photos import NotAPhoto, load_photo
from dheads.media.sound import claimed_seconds, in_a_room, waveform_pieces
from dheads.media.video import check_even, container_of, frame_at, read_frames, video_writer
from dheads.sampling.engine import Engine
from dheads.sampling.jobs import Job, check_inputs
from dheads.sampling.lockstep import Talk, perform
from dheads.speech.encoders import load_speech_encoder
from dheads.speech.interface import SpeechEncoder
from dheads.system.devices import own_device, resolve_device
from dheads.system.distributed import world
from dheads.system.files import PART, is_endless, target_of
from dheads.weights.checkpoints import load_model

PLACES = {"cuda": 16}  # videos in lock-step; more make no more frames a second
_PLACES = 8  # on other devices
MAX_SPOOLED = 8 << 30  # bytes of sound from a pipe
_CHUNK = 1 << 20  # bytes read at a time
_STILL = 0.8  # the photo's share in the motion frames of a still head
_SEARCHED_FRAMES = 10 * FPS  # of a video, for its first face
_MUCH_BEYOND = 0.1  # of the frame, beyond the edge of the picture


@dataclass(frozen=True)
class Result:
    """One finished video."""

    path: Path
    frames: int
    seconds: float  # length of the video
    sampling_seconds: float
    notes: list[str] = field(default_factory=list)  # what the user should know, such as several faces in the photo


@dataclass(frozen=True)
class Outcome:
    """What became of one job of a list."""

    output: Path
    frames: int = 0
    seconds: float = 0.0  # length of the video
    notes: list[str] = field(default_factory=list)
    error: str | None = None  # why there is no video
    skipped: bool = False  # it was there already


def sample(
    face: Path | str,
    audio: Path | str | BinaryIO,
    output: Path | str | BinaryIO,
    *,
    device: str = "auto",
    compiled: bool = False,
    progress: bool = True,
    **options: Any,
) -> Result:
    """Write to `output` a video in which the person of `face`, a photo or a video, speaks the recording `audio`.

    It is an MP4, or an M4V or MOV where the name says so. A stream, a pipe or a device as `output` gets it in
    fragments, which can be played before it ends. `options` are those of `jobs.Job`, such as seed and size; what is
    None is as the weights recommend. The same seed on the same device gives the same video. `compiled`: by
    torch.compile, which takes a minute before it is faster. Sound is read as frames are made, so that hours of it take
    no more memory than a minute.
    Raises DheadsError for input that cannot be used; then nothing is written.
    """
    job = Job(face, audio, output, **options)
    _check(job)
    engine, scene = _ready(job, device, compiled, progress)
    frames = generate(engine, scene.talk.photo, scene.talk.speech, seed=job.seed)
    start = time.monotonic()
    # Closed also when writing fails, so that the error begins a line of its own.
    with tqdm(frames, total=scene.frames, desc="sample", unit="frame", disable=not progress) as bar:
        try:
            with video_writer(job.output, job.audio, audio_codec=job.audio_codec) as writer:
                for frame in bar:
                    writer.add(scene.finish(frame))
        except _compile_errors(compiled) as error:
            raise _not_compiled(error) from error
    spent, notes = time.monotonic() - start, scene.notes + writer.notes
    return Result(Path(name_of(job.output)), writer.count, writer.count / FPS, spent, notes)


def frames(
    face: Path | str,
    audio: Path | str | BinaryIO,
    *,
    device: str = "auto",
    compiled: bool = False,
    progress: bool = True,
    **options: Any,
) -> Iterator[np.ndarray]:
    """Yield the frames, (H, W, 3) uint8, 25 a second, of the video that `sample` with the same options would write."""
    job = Job(face, audio, Path(os.devnull), **options)
    check_inputs(job)
    engine, scene = _ready(job, device, compiled, progress)
    yield from map(scene.finish, generate(engine, scene.talk.photo, scene.talk.speech, seed=job.seed))


def _ready(job: Job, device: str, compiled: bool, progress: bool) -> tuple[Engine, Scene]:
    """All that a single video needs. Raises DheadsError for what cannot be used."""
    studio = Studio(job.weights, resolve_device(device), progress)
    return studio.engine(job, compiled), studio.scene(job)


def sample_all(
    jobs: Sequence[Job],
    *,
    device: str = "auto",
    compiled: bool = False,
    overwrite: bool = False,
    shard: tuple[int, int] | None = None,
    progress: bool = True,
) -> Iterator[Outcome]:
    """Make many videos in lock-step, and yield what became of each job as soon as that is known.

    Photos and sounds are read when their turn comes. An output that is there already is kept, unless `overwrite`, so
    that a run that was killed goes on where it stopped; what it left half-written is removed. A job that fails is no
    error: its outcome says why. shard: (3, 16) makes the third of 16 parts; under torchrun each process its own part,
    on its own GPU.
    """
    place = own_device(resolve_device(device))
    todo = []
    part, parts = world().own_shard(shard) or (1, 1)
    for job in jobs[part - 1 :: parts]:
        if outcome := _known_outcome(job, overwrite):
            yield outcome
        else:
            todo.append(job)
    _sweep(todo)
    with tqdm(desc="sample", unit="frame", disable=not progress or not todo) as bar:
        for done, outcome in enumerate(_all(todo, place, compiled, progress, bar.update), 1):
            bar.set_postfix_str(f"{done}/{len(todo)} videos")
            yield outcome


def _all(
    jobs: list[Job], device: torch.device, compiled: bool, progress: bool, tick: Callable[[], Any]
) -> Iterator[Outcome]:
    """One network after the other, each loaded once."""
    for group in _grouped(jobs, lambda job: job.weights):
        try:
            studio = Studio(group[0].weights, device, progress)
        except DheadsError as error:
            yield from (Outcome(job.output, error=str(error)) for job in group)
            continue
        for alike in _grouped(group, lambda job: (job.steps, job.solver, job.guidance, job.still)):
            try:
                engine = studio.engine(alike[0], compiled)
            except DheadsError as error:
                yield from (Outcome(job.output, error=str(error)) for job in alike)
                continue
            try:
                yield from _together(studio, engine, alike, tick)
            except _compile_errors(compiled) as error:
                raise _not_compiled(error) from error


def _grouped(jobs: Iterable[Job], key: Callable[[Job], Any]) -> list[list[Job]]:
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        groups.setdefault(key(job), []).append(job)
    return list(groups.values())


def _together(studio: Studio, engine: Engine, jobs: list[Job], tick: Callable[[], Any]) -> Iterator[Outcome]:
    """Jobs that the same engine makes, in lock-step."""
    refused: deque[Outcome] = deque()  # jobs whose video could not be begun
    takes: dict[int, _Take] = {}  # under way, by the number of their talk
    over: set[int] = set()  # numbers of talks, made or failed
    begun = 0

    def talks() -> Iterator[Talk]:
        nonlocal begun
        for job in jobs:
            try:
                take = _Take(job, studio)
            except Exception as error:  # whatever a hostile file provokes, the other jobs go on
                refused.append(Outcome(job.output, error=_reason(error)))
                continue
            takes[begun] = take
            begun += 1
            yield take.talk()

    places = min(PLACES.get(engine.device.type, _PLACES), len(jobs))
    try:
        for number, frame, last in perform(engine, talks(), places, over):
            while refused:
                yield refused.popleft()
            tick()
            if outcome := takes[number].add(frame, last):
                del takes[number]
                over.add(number)
                yield outcome
        yield from refused
    finally:
        for take in takes.values():
            take.writer.discard()


class _Take:
    """A job under way."""

    def __init__(self, job: Job, studio: Studio) -> None:
        """Raises DheadsError for a job that cannot be done; then nothing is left of it."""
        _check(job)
        self._output = job.output
        self._scene = studio.scene(job)
        self._unheard: str | None = None  # what is wrong with the rest of the sound
        self.writer = video_writer(job.output, job.audio, audio_codec=job.audio_codec)

    def talk(self) -> Talk:
        return dataclasses.replace(self._scene.talk, speech=self._speech())

    def _speech(self) -> Iterator[Tensor]:
        try:
            yield from self._scene.talk.speech
        except Exception as error:  # whatever a hostile file provokes midway, the other jobs go on
            self._unheard = _reason(error)

    def add(self, frame: np.ndarray, last: bool) -> Outcome | None:
        """Write the next frame; with the last one, or when something fails, what became of the job."""
        if self._unheard:
            self.writer.discard()
            return Outcome(self._output, error=self._unheard)
        try:
            self.writer.add(self._scene.finish(frame))
            if not last:
                return None
            self.writer.close()
        except DheadsError as error:
            return Outcome(self._output, error=str(error))
        return Outcome(self._output, self.writer.count, self.writer.count / FPS, self._scene.notes + self.writer.notes)


def _reason(error: Exception) -> str:
    if isinstance(error, DheadsError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (unexpected; please report it)"


# --- Before the first frame ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scene:
    """What one video is made from, and what is done to its frames."""

    talk: Talk  # its speech comes in chunks, once
    frames: int | None  # about how many, if the sound's container says so
    finish: Callable[[np.ndarray], np.ndarray]
    notes: list[str]


@dataclass(frozen=True, eq=False)
class Portrait:
    """A picture and where the face in it is."""

    picture: np.ndarray  # (H, W, 3) uint8
    matrix: np.ndarray  # (2, 3) from the picture to the crop
    notes: list[str]


class Studio:
    """The networks that one set of weights needs, loaded once."""

    def __init__(self, weights: str, device: torch.device, progress: bool = True) -> None:
        """Raises DheadsError for weights that cannot be used."""
        self.unet, self.config, _ = load_model(weights, device, progress)
        self._weights, self._device, self._progress = weights, device, progress

    @cached_property
    def backend(self) -> LandmarkBackend:
        return load_backend(self.config.alignment.landmarks)

    @cached_property
    def encoder(self) -> SpeechEncoder:
        return load_speech_encoder(self.config.conditioning.speech_encoder, self._device, self._progress)

    def engine(self, job: Job, compiled: bool = False) -> Engine:
        """Raises DheadsError for settings that these weights do not take."""
        sampling = chosen(self.config.sampling, steps=job.steps, solver=job.solver, guidance=job.guidance)
        if job.still:
            sampling = chosen(sampling, identity_anchor=max(_STILL, sampling.identity_anchor))
        if sampling.steps > self.config.diffusion.num_steps:
            raise DheadsError(
                f"{self._weights}: was trained with {self.config.diffusion.num_steps} timesteps, which cannot be "
                f"walked in {sampling.steps} steps"
            )
        if sampling.guidance != 1 and self.config.training.audio_dropout == 0:
            raise DheadsError(f"{self._weights}: was trained with sound only, so it takes no guidance; leave it at 1")
        return Engine(self.unet, sampling, compiled=compiled)

    def scene(self, job: Job) -> Scene:
        """The photo of a job, read, and its sound, begun. Raises DheadsError for what cannot be used."""
        portrait = find_portrait(job.face, self.config, self.backend, at=job.at, which=job.which)
        size = self.config.model.image_size
        finish = partial(enlarge, size=job.size)
        if job.paste:
            finish = Paster(portrait.picture, portrait.matrix, size, self.config.alignment)
        photo = framed(portrait.picture, portrait.matrix, size)
        hearing = hear(job.audio)
        seconds = claimed_seconds(job.audio, hearing)
        frames = None if seconds is None else round(seconds * FPS)
        talk = Talk(photo, self._speech(job.audio, hearing, seconds), job.seed)
        notes = portrait.notes if job.paste else [*portrait.notes, *_beyond(portrait, size, job.face)]
        return Scene(talk, frames, finish, [*notes, *hearing.notes])

    def _speech(self, audio: Path | BinaryIO, hearing: Hearing, seconds: float | None) -> Iterator[Tensor]:
        """Embeddings in chunks (f, D), begun, so that what is wrong with the sound is said before a video is."""
        if seconds is not None and seconds > MAX_SECONDS:
            # Nobody wants to hear of it after hours of work, but the claim may be wrong: read it all.
            deque(waveform_pieces(audio, hearing), maxlen=0)
        chunks = self.hear(waveform_pieces(audio, hearing))
        return chain([next(chunks)], chunks)

    def hear(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """16 kHz sound in pieces (n,) -> embeddings in chunks (f, D) on the CPU, as these weights want to hear it."""
        heard = in_a_room(pieces, self.config.sampling.room_noise)
        return (chunk.cpu() for chunk in self.encoder.encode_pieces(heard))


def _beyond(portrait: Portrait, size: int, path: Path) -> list[str]:
    """What the user should know of a frame that reaches far beyond the picture's edge."""
    share = (beyond_edge(portrait.picture.shape, portrait.matrix, size) > 0).mean()
    if share < _MUCH_BEYOND:
        return []
    return [f"{path} ends close to the face, so {share:.0%} of the frame are blurred; --paste shows the photo as it is"]


def find_portrait(
    path: Path | str, config: Config, backend: LandmarkBackend, *, at: float | None = None, which: int | None = None
) -> Portrait:
    """The face in a photo or in a video.

    at: seconds into a video; by default its first frame with a face. which: of several faces, counted from the largest.
    Raises DheadsError where there is no such face.
    """
    notes: list[str] = []
    picture, name = _picture(Path(path), backend, at, notes)
    face, count = find_face(picture, backend, name, which or 1)
    if which is None and count > 1:
        notes.append(f"{name} shows {count} faces; taking the largest")
    matrix = align_transforms(face.landmarks[None], config.alignment, config.model.image_size)[0]
    return Portrait(picture, matrix, notes)


def _picture(path: Path, backend: LandmarkBackend, at: float | None, notes: list[str]) -> tuple[np.ndarray, str]:
    """The picture to look for a face in, and what messages call it."""
    try:
        photo = load_photo(path, notes)
    except NotAPhoto as no_photo:
        if at is not None:
            return frame_at(path, at), f"{path} at {at:g} s"
        first = None
        try:
            for frame in islice(read_frames(path), _SEARCHED_FRAMES):
                first = frame if first is None else first
                if any(in_view(face, frame.shape) for face in backend.glance(frame)):
                    return frame, str(path)
        except DheadsError:
            if _is_sound(path):
                raise DheadsError(f"{path} is sound without a picture; give FACE first, then AUDIO") from None
            raise no_photo from None
        return first, str(path)
    if at is not None:
        raise DheadsError(f"{path} is a photo; a time is for a video")
    return photo, str(path)


def _is_sound(path: Path) -> bool:
    with suppress(DheadsError), opened(path, str(path)) as container:
        return bool(container.streams.audio) and not container.streams.video
    return False


@contextmanager
def spooled(stream: BinaryIO) -> Iterator[BinaryIO]:
    """A stream's data as a temporary file, as sound is read twice; it never has a name that could be left behind."""
    name = name_of(stream)
    with TemporaryFile() as file:
        try:
            while part := stream.read(_CHUNK):
                file.write(part)
                if file.tell() > MAX_SPOOLED:
                    raise DheadsError(f"{name} gives more than {MAX_SPOOLED >> 30} GiB; give the sound as a file")
            file.flush()
        except OSError as error:
            raise DheadsError(f"cannot keep the sound from {name}: {error.strerror}; free some disk space") from error
        file.raw.name = name  # for messages
        yield file


def chosen(sampling: SamplingConfig, **wanted: Any) -> SamplingConfig:
    """The weights' own settings, but for those that are given."""
    return dataclasses.replace(sampling, **{name: value for name, value in wanted.items() if value is not None})


def _check(job: Job) -> None:
    """Raises DheadsError for what can be told without reading anything, before any work is done."""
    check_inputs(job)
    if job.size is not None:
        check_even(job.size, job.size)
    if not isinstance(job.output, Path) or is_endless(job.output):
        return
    try:
        folder = target_of(job.output).parent
    except OSError as error:
        raise DheadsError(f"cannot write {job.output}: {error.strerror}") from error
    container_of(job.output)
    if not folder.is_dir():
        raise DheadsError(f"{job.output}: the folder {folder} does not exist; create it or choose another")
    if not os.access(folder, os.W_OK):
        raise DheadsError(f"{job.output}: the folder {folder} cannot be written to; choose another")
    for source in (job.face, job.audio):
        with suppress(OSError):
            if isinstance(source, Path) and job.output.samefile(source):
                raise DheadsError(f"{job.output} is the input itself; give the video another name")


def _known_outcome(job: Job, overwrite: bool) -> Outcome | None:
    """What is known of a job before it is tried."""
    if job.fault is not None:
        return Outcome(job.output, error=job.fault)
    try:
        container_of(job.output)
    except DheadsError as error:
        return Outcome(job.output, error=str(error))
    return Outcome(job.output, skipped=True) if not overwrite and os.path.isfile(job.output) else None


def _sweep(jobs: list[Job]) -> None:
    """Delete what a killed run left of these outputs."""
    targets = [Path(os.path.realpath(job.output)) for job in jobs]
    ours = {(target.parent, target.name[:200]) for target in targets}
    for folder in {folder for folder, _ in ours}:
        for path in folder.glob(".*.part"):
            match = PART.fullmatch(path.name)
            if match and (folder, match[1]) in ours:
                with suppress(OSError):
                    path.unlink()


# --- Frames ----------------------------------------------------------------------------------------------------------


def generate(
    engine: Engine, photo: np.ndarray, speech: Tensor | Iterable[Tensor], *, seed: int = 0, lips: Tensor | None = None
) -> Iterator[np.ndarray]:
    """Yield the frames, (H, W, 3) uint8, of the aligned `photo` (H, W, 3) speaking `speech` (paper section 3.5).

    `speech`: embeddings (F, D), or chunks (f, D) of them. `lips`: normalised lip codes (F, L) in place of those
    predicted from the speech.
    """
    for _, frame, _ in perform(engine, [Talk(photo, speech, seed, lips)]):
        yield frame


def enlarge(frame: np.ndarray, size: int | None) -> np.ndarray:
    """A square frame at `size` px; None keeps it."""
    if size is None or size == len(frame):
        return frame
    return cv2.resize(frame, (size, size), interpolation=cv2.INTER_LANCZOS4)


def _compile_errors(compiled: bool) -> tuple[type[Exception], ...]:
    if not compiled:
        return ()
    from torch._dynamo.exc import TorchDynamoException  # takes a second to load

    return (TorchDynamoException,)


def _not_compiled(error: Exception) -> DheadsError:
    reason = str(error).strip().splitlines()[0]
    return DheadsError(f"torch.compile fails here ({reason}); install a C++ compiler, or do not compile")
