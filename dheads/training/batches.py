"""Batches of training examples: which clips and frames they show, and their tensors."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Container, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dheads.conditioning import Cues, motion_indices
from dheads.config import Config
from dheads.dataset.clips import PICTURES, SPEECH, ClipReader, Clips, Facts
from dheads.dataset.dataset import Dataset
from dheads.dataset.manifest import Clip
from dheads.errors import DheadsError
from dheads.extensions.codes import codes_of
from dheads.extensions.motion import anchored
from dheads.extensions.pose import PoseCode, relative
from dheads.media.pixels import to_unit
from dheads.system.prefetch import prefetch
from dheads.training.augment import altered
from dheads.training.balance import clip_shares
from dheads.training.geometry import Geometry

# Seeds of random numbers for different purposes, so that they are independent.
_ORDER, _EXAMPLE, _AUGMENT, _ROLLOUT, _VOICE, _OTHER = range(1, 7)
_MAX_FAILURES = 20  # in a row: more means that the whole folder cannot be read


@dataclass(frozen=True)
class Lead:
    """Inputs for generating the motion frames of some examples: M frames, one after the other."""

    index: Tensor  # (n,) positions of these examples in the batch
    motion_frames: Tensor  # (n, M, 3, H, W), anchored, the frames before the first one to generate
    cues: Cues  # (n, M, ...), codes as measured


@dataclass(frozen=True)
class Batch:
    """Training examples; frames in [-1, 1]."""

    target: Tensor  # (B, 3, H, W)
    identity: Tensor  # (B, 3, H, W)
    motion_frames: Tensor  # (B, M, 3, H, W), anchored
    cues: Cues  # (B, ...), codes as measured; the pose relative to the identity's
    mouth_box: Tensor  # (B, 4) half-open px, in the target
    code_boxes: dict[str, Tensor]  # (B, 4) by code, like mouth_box
    clips: list[str]  # names, by example
    points: Tensor | None = None  # (B, 2, 68, 2) from -1 to 1, where the photo is moved: target's, identity's landmarks
    lead: Lead | None = None  # None: no example has generated motion frames


@dataclass(frozen=True)
class _Example:
    """References to the pictures and labels of one example, which its source of clips turns into values."""

    clip: str
    pictures: Tensor  # (2 + M, ...) target, identity, motion frames; for roll-outs also the M frames before these
    # By kind, speech and each code: (1, A, ...) around the target; for roll-outs (M + 1, A, ...) around the motion
    # frames and the target.
    windows: dict[str, Tensor]
    poses: Tensor  # (2 + M, 6) of the pictures
    landmarks: Tensor  # (2, 68, 2) px of target and identity
    boxes: Tensor  # (1 + codes, 4) of the mouth and of each code's region
    has_rollout: bool  # whether the network generates its motion frames


@dataclass(frozen=True)
class Chosen:
    """The examples chosen for a batch, before its tensors are assembled."""

    step: int
    part: int
    examples: list[_Example]


class Batches:
    """Makes the batches of a run from clips.

    A step has `parts` batches, numbered from 0: one for each process and each turn of gradient accumulation. Each
    example of the run has its own random numbers, so a resumed run gets the same batches as an uninterrupted one, and
    a step consists of the same examples however it is divided into parts.
    """

    broken: dict[str, str]  # clip -> why it cannot be read, in the order of discovery

    def __init__(
        self, dataset: Dataset, clips: list[Clip], config: Config, parts: int = 1, source: Clips | None = None
    ) -> None:
        """source: gives pictures and labels; None: they are read from the disk on demand."""
        examples, rollouts = config.extensions.examples, config.extensions.rollouts
        self._codes = codes_of(config)
        self._clips, self._config, self._parts = clips, config, parts
        self._root = dataset.root
        self._source = source or ClipReader(dataset, config.conditioning.speech_dim)
        self._cumulative: np.ndarray | None = None  # cumulative probabilities of the clips
        if examples.balance == "speakers":
            shares = clip_shares(clips, examples.still_share, examples.speaker_cap, examples.source_cap)
            self._cumulative = np.cumsum(shares)
            self._cumulative /= self._cumulative[-1]
        self._of_speaker: dict[str, list[Clip]] = defaultdict(list)
        for clip in clips:
            self._of_speaker[clip.speaker].append(clip)
        self.rollout_step: float = rollouts.start * config.optimisation.steps  # the first step with roll-outs
        self._order = lru_cache(maxsize=4)(self._permutation)
        self.broken = {}
        self._failures = 0  # in a row
        self._lock = threading.Lock()

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every clip is used once."""
        return len(self._clips) / (self._parts * self._config.optimisation.batch_size)

    def clips_of(self, step: int, part: int) -> list[Clip]:
        """The clips of a batch, including those that cannot be read and will be replaced."""
        return [self._clip(n, self._rng(_EXAMPLE, n)) for n in self._numbers(step, part)]

    def batch(self, step: int, part: int) -> Batch:
        """The batch of that step and part: a function of these, the seed, and which clips can be read.

        A clip that cannot be read is replaced by another and recorded in `broken`, for the caller to report.
        Raises DheadsError after 20 such clips in a row.
        """
        return self.assemble(self.choose(step, part))

    def choose(self, step: int, part: int) -> Chosen:
        """The first half of `batch`, which runs on the CPU."""
        return Chosen(step, part, [self._example(n) for n in self._numbers(step, part)])

    def assemble(self, chosen: Chosen) -> Batch:
        """The second half of `batch`, which runs on the device that holds the clips."""
        examples, device, config = chosen.examples, self._source.device, self._config
        pictures = torch.stack([example.pictures for example in examples])
        frames = to_unit(self._source.gathered(PICTURES, pictures))
        boxes = torch.stack([example.boxes for example in examples]).to(device)  # (B, 1 + codes, 4)
        cues = self._cues(examples)  # (B, 1 or M + 1, ...)
        seed = int(self._rng(_AUGMENT, chosen.step * self._parts + chosen.part).integers(2**62))
        generator, size = torch.Generator().manual_seed(seed), frames.shape[-1]
        augments, moves = config.extensions.examples.augment, config.extensions.warp.flow
        geometry = Geometry.none(len(frames), device)
        if augments:
            geometry = Geometry.random(len(frames), size, generator, device)
        pose = points = None
        if moves:
            pose = torch.stack([example.poses for example in examples]).to(device)  # (B, 2 + M, 6)
            geometry = geometry.about(pose[:, 1])  # the identity is framed as a photo
            landmarks = torch.stack([example.landmarks for example in examples]).to(device)
            points = (2 * landmarks + 1) / size - 1  # (B, 2, 68, 2)
            points = geometry.points(points.flatten(1, 2)).view_as(points)
            cues = _framed(cues, geometry, pose[:, 1])
            pose = geometry.poses(relative(pose, pose[:, 1:2]))
        if augments or moves:
            boxes, frames = geometry.boxes(boxes, size), geometry.pictures(frames)
        if augments:
            frames = altered(frames, generator)
        count = config.conditioning.motion_frames
        motion_frames = self._anchored(frames, pose)
        index = torch.tensor([number for number, example in enumerate(examples) if example.has_rollout])
        lead = None
        if len(index):
            index = index.to(device)
            lead = Lead(index, motion_frames[index, count:], cues[index].map(lambda windows: windows[:, :-1]))
        return Batch(
            target=frames[:, 0],
            identity=frames[:, 1],
            motion_frames=motion_frames[:, :count],
            cues=cues.map(lambda windows: windows[:, -1]),
            mouth_box=boxes[:, 0],
            code_boxes={code.name: boxes[:, number] for number, code in enumerate(self._codes, 1)},
            clips=[example.clip for example in examples],
            points=points,
            lead=lead,
        )

    def _anchored(self, frames: Tensor, pose: Tensor | None) -> Tensor:
        """The motion frames among the pictures (B, N, 3, H, W) of poses (B, N, 6), as sampling has them."""
        motion_frames = frames[:, 2:]
        identity = frames[:, 1:2].expand_as(motion_frames).flatten(0, 1)
        poses = None if pose is None else pose[:, 2:].flatten(0, 1)
        return anchored(self._config, motion_frames.flatten(0, 1), identity, poses).view_as(motion_frames)

    def _cues(self, examples: list[_Example]) -> Cues:
        """The cues of a batch, (B, 1, ...), or (B, M + 1, ...) where it has roll-outs."""

        def gathered(kind: str) -> Tensor:
            return self._source.gathered(kind, torch.stack([example.windows[kind] for example in examples]))

        return Cues(gathered(SPEECH), {code.name: gathered(code.name) for code in self._codes})

    def ahead(self, keys: Iterable[tuple[int, int]], threads: int) -> Generator[Batch]:
        """Yield the batch of each key, a (step, part), in order, prepared ahead by that many threads.

        `keys` may be endless. An exception is raised when its batch is due. Closing the generator ends the threads.
        """
        if self._source.device.type == "cpu":
            yield from prefetch(self.batch, keys, threads)
            return
        # All GPU work is issued by the caller's thread. Choosing is Python code: more threads would take turns.
        with closing(prefetch(self.choose, keys, 1)) as chosen:
            yield from map(self.assemble, chosen)

    def _numbers(self, step: int, part: int) -> range:
        """The numbers, within the run, of a batch's examples."""
        size = self._config.optimisation.batch_size
        first = (step * self._parts + part) * size
        return range(first, first + size)

    def _rng(self, purpose: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self._config.optimisation.seed, purpose, number])

    def _clip(self, n: int, rng: np.random.Generator) -> Clip:
        """The clip of example n."""
        if self._cumulative is not None:
            return self._random_clip(rng)
        epoch, index = divmod(n, len(self._clips))
        return self._clips[int(self._order(epoch)[index])]

    def _random_clip(self, rng: np.random.Generator) -> Clip:
        if self._cumulative is None:
            return self._clips[rng.integers(len(self._clips))]
        return self._clips[int(np.searchsorted(self._cumulative, rng.random(), side="right"))]

    def _permutation(self, epoch: int) -> np.ndarray:
        return self._rng(_ORDER, epoch).permutation(len(self._clips))

    def _example(self, n: int) -> _Example:
        rng = self._rng(_EXAMPLE, n)
        clip = self._clip(n, rng)
        while True:
            try:
                example = self._example_of(clip, rng, n)
            except DheadsError as error:
                self._note_failure(clip, error)
                clip = self._random_clip(rng)
            else:
                self._failures = 0
                return example

    def _may_roll_out(self, n: int) -> bool:
        """Whether example n belongs to a step with roll-outs."""
        if not self._config.conditioning.motion_frames:
            return False
        step = n // (self._parts * self._config.optimisation.batch_size)
        return self._config.extensions.rollouts.share > 0 and step >= self.rollout_step

    def _note_failure(self, clip: Clip, error: DheadsError) -> None:
        with self._lock:
            if clip.clip not in self.broken:
                self.broken[clip.clip] = str(error)
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                raise DheadsError(
                    f"{self._root}: {_MAX_FAILURES} clips in a row could not be read (the last: {error}); is "
                    "the folder still there, and its disk mounted? Then the same command resumes the run"
                ) from error

    def _example_of(self, clip: Clip, rng: np.random.Generator, n: int) -> _Example:
        """Example n from that clip. Raises DheadsError where the clip cannot be read."""
        cond, source = self._config.conditioning, self._source
        facts = source.facts(clip)
        usable = self._usable(facts)
        target, identity = (usable[k] for k in choose_frames(len(usable), cond.identity_frame == "first", rng))
        target = self._target_with_event(facts, usable, target, identity, rng)
        start_share = self._config.extensions.motion.start_share
        is_start = start_share > 0 and rng.random() < start_share
        rolls_out, count = self._may_roll_out(n), cond.motion_frames
        before = motion_indices(0 if is_start else target, 2 * count if rolls_out else count)
        wanted = [target, None, *before[-count:], *before[:-count]]  # None: the identity
        chosen = [identity if k is None else k for k in wanted]
        pictures, poses = source.pictures(clip, chosen), facts.pose[chosen]
        landmarks = facts.landmarks[chosen[:2]]
        if (other := self._other_identity(clip, n)) is not None:
            copies = [number for number, k in enumerate(wanted) if k is None]
            pictures[copies], poses[copies], landmarks[1] = other
        share = self._config.extensions.rollouts.share
        has_rollout = rolls_out and before[-count] is not None and self._rng(_ROLLOUT, n).random() < share
        frames = torch.arange(target - count if rolls_out else target, target + 1)
        voices = facts.voices if self._config.extensions.examples.augment else 1
        voice = int(self._rng(_VOICE, n).integers(voices)) if voices > 1 else 0
        tables = self._config.extensions.codes
        windows = {SPEECH: source.window(SPEECH, clip, frames, cond.audio_context, voice)}
        for code in self._codes:
            windows[code.name] = source.window(code.name, clip, frames, tables[code.name].context)
        boxes = [facts.mouth_box[target], *(facts.code_boxes[code.name][target] for code in self._codes)]
        return _Example(clip.clip, pictures, windows, poses, landmarks, torch.stack(boxes), has_rollout)

    def _usable(self, facts: Facts) -> Sequence[int]:
        """The frames that may be target or identity."""
        # With the photo moved, pictures are framed about the identity: a head at the edge would leave little of them.
        return facts.framed if self._config.extensions.warp.flow else range(len(facts.pose))

    def _target_with_event(
        self, facts: Facts, usable: Container[int], target: int, identity: int, rng: np.random.Generator
    ) -> int:
        """The target frame, replaced in a share of the examples by a usable one that shows an event of a code."""
        for code in self._codes:
            share = self._config.extensions.codes[code.name].event_share
            events = [frame for frame in facts.events[code.name] if frame != identity and frame in usable]
            if share and events and rng.random() < share:
                target = events[rng.integers(len(events))]
        return target

    def _other_identity(self, clip: Clip, n: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """In a share of the examples, picture, pose and landmarks of the speaker in another clip; else None.

        In sampling the identity is not a frame of the video either: a photo may smile where the video does not.
        """
        share = self._config.extensions.examples.other_clip_share
        if not clip.moves or share == 0:
            return None
        rng = self._rng(_OTHER, n)
        if rng.random() >= share:
            return None
        others = [other for other in self._of_speaker[clip.speaker] if other is not clip]
        if not others:
            return None
        other = others[rng.integers(len(others))]
        try:
            facts = self._source.facts(other)
            usable = self._usable(facts)
            frame = usable[int(rng.integers(len(usable)))]
            return self._source.pictures(other, [frame])[0], facts.pose[frame], facts.landmarks[frame]
        except DheadsError as error:
            self._note_failure(other, error)
            return None


def _framed(cues: Cues, geometry: Geometry, identity: Tensor) -> Cues:
    """Cues (B, n, ...) with their pose relative to the identity's, (B, 6), in the new frame."""
    pose = relative(cues.codes[PoseCode.name], identity[:, None, None])
    return Cues(cues.audio_window, {**cues.codes, PoseCode.name: geometry.poses(pose)})


def seeded(*numbers: int) -> torch.Generator:
    """A generator on the CPU, seeded with all of these numbers: the run's seed, the step, the part and so on."""
    entropy = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(entropy[0] >> 1))


def seed_from(generator: torch.Generator) -> int:
    """The generator's next random number as a seed for another one."""
    return int(torch.randint(2**62, (), generator=generator))


def noise_on(device: torch.device, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers of that shape, generated on `device` so that a GPU need not wait for the CPU."""
    on_device = torch.Generator(device).manual_seed(seed_from(generator))
    return torch.randn(shape, generator=on_device, device=device)


def choose_frames(count: int, from_first: bool, rng: np.random.Generator) -> tuple[int, int]:
    """Random indices of the target and the identity in a clip of `count` frames, as the released code chooses them.

    They differ, as an identity equal to the target would teach the network to copy. from_first: the identity is 0.
    """
    if count == 1:
        return 0, 0
    identity = 0 if from_first else int(rng.integers(count))
    return (identity + int(rng.integers(1, count))) % count, identity
