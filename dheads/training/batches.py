"""The examples of training steps: which clip, which frames, and the tensors that the network is trained on."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dheads.conditioning import motion_indices
from dheads.config import Config
from dheads.dataset.clips import ClipReader, Clips, Kind
from dheads.dataset.dataset import Clip, Dataset
from dheads.errors import DheadsError
from dheads.media.video import to_unit
from dheads.system.prefetch import prefetch
from dheads.training.augment import augment

# Keep the random numbers of one purpose apart from those of another.
_ORDER, _EXAMPLE, _AUGMENT, _ROLLOUT, _VOICE, _OTHER = range(1, 7)
_MAX_FAILURES = 20  # in a row: then it is not the clips, but the folder


@dataclass(frozen=True)
class Lead:
    """What the network draws some examples' motion frames from by itself, R = M frames one after the other."""

    index: Tensor  # (n,) which examples of the batch
    motion_frames: Tensor  # (n, M, 3, H, W) before the first of them
    audio_windows: Tensor  # (n, R, A, D)
    lip_windows: Tensor  # (n, R, A', 3) centred measures
    eye_windows: Tensor  # (n, R, A'', 1)


@dataclass(frozen=True)
class Batch:
    """Training examples; frames in [-1, 1]."""

    target: Tensor  # (B, 3, H, W)
    identity: Tensor  # (B, 3, H, W)
    motion_frames: Tensor  # (B, M, 3, H, W)
    audio_window: Tensor  # (B, A, D)
    lip_window: Tensor  # (B, A', 3) centred measures
    mouth_box: Tensor  # (B, 4) half-open px, of the target
    eye_window: Tensor  # (B, A'', 1)
    eye_box: Tensor  # (B, 4) as mouth_box
    clips: list[str]
    lead: Lead | None = None  # late in a run with training.rollout_share


@dataclass(frozen=True)
class _Example:
    """Which pictures and labels an example is made of, in the words of their source."""

    clip: str
    pictures: Tensor  # (2 + M, ...): target, identity, motion frames; then M before these for roll-outs
    speech: Tensor  # (1, A, ...) around the target; or (M + 1, A, ...) around the motion frames and the target
    lips: Tensor  # (1 or M + 1, A', ...)
    eyes: Tensor  # (1 or M + 1, A'', ...)
    boxes: Tensor  # (2, 4): mouth, eyes
    leads: bool  # whether the network is to draw its motion frames


@dataclass(frozen=True)
class Chosen:
    """The examples of a batch, before it is made of them."""

    step: int
    part: int
    examples: list[_Example]


class Draws:
    """Draws batches from clips; a step's batches together are `parts`, numbered from 0, each a process's or a turn's.

    Example n of the run has random numbers of its own, so that a resumed run draws what the unbroken one would, and
    the same examples make up a step however it is split into parts.
    """

    broken: dict[str, str]  # clip -> why it could not be read, in the order found

    def __init__(
        self, dataset: Dataset, clips: list[Clip], config: Config, parts: int = 1, source: Clips | None = None
    ) -> None:
        """source: where the clips are; None: read as they are asked for."""
        training = config.training
        self._clips, self._config, self._parts = clips, config, parts
        self._root = dataset.root
        self._source = source or ClipReader(dataset, config.conditioning.speech_dim)
        self._cumulative = None  # by clip: the probability of drawing it or one before it
        if training.balance == "speakers":
            shares = _shares(clips, training.still_share, training.speaker_cap, training.source_cap)
            self._cumulative = np.cumsum(shares)
            self._cumulative /= self._cumulative[-1]
        self._of_speaker: dict[str, list[Clip]] = defaultdict(list)
        for clip in clips:
            self._of_speaker[clip.speaker].append(clip)
        self.rollout_step: float = training.rollout_from * training.steps  # the first one with roll-outs
        self._order = lru_cache(maxsize=4)(self._permutation)
        self.broken = {}
        self._failures = 0  # in a row
        self._lock = threading.Lock()

    @property
    def steps_per_epoch(self) -> float:
        """Steps until every clip was drawn once."""
        return len(self._clips) / (self._parts * self._config.training.batch_size)

    def clips_of(self, step: int, part: int) -> list[Clip]:
        """The clips that a batch is drawn from, before those that cannot be read are replaced."""
        return [self._choice(n, self._rng(_EXAMPLE, n)) for n in self._numbers(step, part)]

    def draw(self, step: int, part: int) -> Batch:
        """A pure function of the seed, the step, the part, and of which clips can be read.

        A clip that cannot be read is replaced by another and noted in `broken`, for the caller to tell.
        Raises DheadsError when none can be read any more.
        """
        return self.made(self.choose(step, part))

    def choose(self, step: int, part: int) -> Chosen:
        """What `draw` does on the CPU."""
        return Chosen(step, part, [self._example(n) for n in self._numbers(step, part)])

    def made(self, chosen: Chosen) -> Batch:
        """What `draw` does where the clips are."""
        examples, source = chosen.examples, self._source

        def gathered(kind: Kind) -> Tensor:
            return source.gathered(kind, torch.stack([getattr(example, kind) for example in examples]))

        frames = to_unit(gathered("pictures"))  # (B, 2 + M, 3, H, W)
        boxes = torch.stack([example.boxes for example in examples])  # (B, 2, 4)
        if self._config.training.augment:
            seed = int(self._rng(_AUGMENT, chosen.step * self._parts + chosen.part).integers(2**62))
            frames, boxes = augment(frames, boxes, torch.Generator().manual_seed(seed))
        count = self._config.conditioning.motion_frames
        windows = [gathered("speech"), gathered("lips"), gathered("eyes")]  # (B, 1 or M + 1, A, D) each
        boxes = boxes.to(source.device)
        index = torch.tensor([place for place, example in enumerate(examples) if example.leads])
        lead = None
        if len(index):
            index = index.to(source.device)
            lead = Lead(index, frames[index, 2 + count :], *(values[index, :-1] for values in windows))
        audio, lips, eyes = (values[:, -1] for values in windows)
        return Batch(
            target=frames[:, 0],
            identity=frames[:, 1],
            motion_frames=frames[:, 2 : 2 + count],
            audio_window=audio,
            lip_window=lips,
            mouth_box=boxes[:, 0],
            eye_window=eyes,
            eye_box=boxes[:, 1],
            clips=[example.clip for example in examples],
            lead=lead,
        )

    def ahead(self, keys: Iterable[tuple[int, int]], threads: int) -> Iterator[Batch]:
        """The batches of those (step, part), in order, made ahead by that many threads.

        `keys` may be endless. What a draw raises is raised in its turn. Closing the iterator ends the threads.
        """
        if self._source.device.type == "cpu":
            yield from prefetch(self.draw, keys, threads)
            return
        # All work on a GPU is issued by the caller's thread. Choosing is Python code: more threads would take turns.
        with closing(prefetch(self.choose, keys, 1)) as chosen:
            yield from map(self.made, chosen)

    def _numbers(self, step: int, part: int) -> range:
        size = self._config.training.batch_size
        first = (step * self._parts + part) * size
        return range(first, first + size)

    def _rng(self, purpose: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self._config.training.seed, purpose, number])

    def _choice(self, n: int, rng: np.random.Generator) -> Clip:
        """The clip of example n."""
        if self._cumulative is not None:
            return self._any(rng)
        epoch, place = divmod(n, len(self._clips))
        return self._clips[self._order(epoch)[place]]

    def _any(self, rng: np.random.Generator) -> Clip:
        """A clip by chance."""
        if self._cumulative is None:
            return self._clips[rng.integers(len(self._clips))]
        return self._clips[np.searchsorted(self._cumulative, rng.random(), side="right")]

    def _permutation(self, epoch: int) -> np.ndarray:
        return self._rng(_ORDER, epoch).permutation(len(self._clips))

    def _example(self, n: int) -> _Example:
        rng = self._rng(_EXAMPLE, n)
        clip = self._choice(n, rng)
        while True:
            try:
                example = self._read(clip, rng, n)
            except DheadsError as error:
                self._note_failure(clip, error)
                clip = self._any(rng)
            else:
                self._failures = 0
                return example

    def _late(self, n: int) -> bool:
        """Whether example n is of the part of the run in which the network draws motion frames."""
        training = self._config.training
        if not self._config.conditioning.motion_frames:
            return False
        step = n // (self._parts * training.batch_size)
        return training.rollout_share > 0 and step >= self.rollout_step

    def _note_failure(self, clip: Clip, error: DheadsError) -> None:
        with self._lock:
            if clip.clip not in self.broken:
                self.broken[clip.clip] = str(error)
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                raise DheadsError(
                    f"{self._root}: {_MAX_FAILURES} clips in a row could not be read (the last: {error}); is "
                    "the folder still there, and its disk mounted? Then give the same command to go on"
                ) from error

    def _read(self, clip: Clip, rng: np.random.Generator, n: int) -> _Example:
        told, training, source = self._config.conditioning, self._config.training, self._source
        target, identity = _frames(clip.frames, told.identity_frame == "first", rng)
        facts = source.facts(clip)
        shut = [frame for frame in facts.shut if frame != identity]
        if training.blink_share and shut and rng.random() < training.blink_share:
            target = shut[rng.integers(len(shut))]
        # As at the start of a video, at any frame.
        starts = training.start_share > 0 and rng.random() < training.start_share
        late, count = self._late(n), told.motion_frames
        before = motion_indices(0 if starts else target, 2 * count if late else count)
        wanted = [target, None, *before[-count:], *before[:-count]]  # None: the identity
        pictures = source.pictures(clip, [identity if k is None else k for k in wanted])
        if (other := self._other(clip, n)) is not None:
            pictures[[place for place, k in enumerate(wanted) if k is None]] = other
        leads = late and before[-count] is not None and self._rng(_ROLLOUT, n).random() < training.rollout_share
        asked = torch.arange(target - count if late else target, target + 1)
        voices = facts.voices if training.augment else 1
        voice = int(self._rng(_VOICE, n).integers(voices)) if voices > 1 else 0
        return _Example(
            clip.clip,
            pictures,
            source.window("speech", clip, asked, told.audio_context, voice),
            source.window("lips", clip, asked, told.lip_context),
            source.window("eyes", clip, asked, told.eye_context),
            torch.stack([facts.mouth_box[target], facts.eye_box[target]]),
            leads,
        )

    def _other(self, clip: Clip, n: int) -> Tensor | None:
        """In some examples a picture of the speaker in another clip: a photo smiles where its video does not."""
        share = self._config.training.other_clip_share
        if clip.frames == 1 or share == 0:
            return None
        rng = self._rng(_OTHER, n)
        if rng.random() >= share:
            return None
        others = [one for one in self._of_speaker[clip.speaker] if one is not clip]
        if not others:
            return None
        other = others[rng.integers(len(others))]
        try:
            return self._source.pictures(other, [int(rng.integers(other.frames))])[0]
        except DheadsError as error:
            self._note_failure(other, error)
            return None


def seeded(*numbers: int) -> torch.Generator:
    """A generator whose random numbers are those of the seed, the step and the part of its batch, and of a purpose."""
    entropy = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(entropy[0] >> 1))


def seed_from(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def noise_on(device: torch.device, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers made where they are needed: on the CPU, a GPU would wait for them."""
    there = torch.Generator(device).manual_seed(seed_from(generator))
    return torch.randn(shape, generator=there, device=device)


def _frames(count: int, from_first: bool, rng: np.random.Generator) -> tuple[int, int]:
    """Target and identity, never the same frame: that would teach to copy. As the released code draws them."""
    if count == 1:
        return 0, 0
    identity = 0 if from_first else int(rng.integers(count))
    return (identity + int(rng.integers(1, count))) % count, identity


def _shares(clips: list[Clip], still_share: float, speaker_cap: float, source_cap: float = 1.0) -> np.ndarray:
    """The probability of drawing each clip: speakers by the root of their clips' number, none above the cap, and no
    folder of the raw data above its own."""
    still = np.array([clip.frames == 1 for clip in clips])
    speakers, index = np.unique([clip.speaker for clip in clips], return_inverse=True)
    counts = np.bincount(index[~still], minlength=len(speakers))  # of clips that move
    by_speaker = np.sqrt(counts)
    if by_speaker.sum() > 0:
        by_speaker = _capped(by_speaker / by_speaker.sum(), speaker_cap)
    shares = (by_speaker / np.maximum(1, counts))[index] * ~still
    if shares.any():
        _, source = np.unique([clip.source.partition("/")[0] for clip in clips], return_inverse=True)
        by_source = np.bincount(source, shares)
        shares *= (_capped(by_source, source_cap) / np.where(by_source > 0, by_source, 1))[source]
    moving_share = 1.0 if not still.any() else 0.0 if still.all() else 1 - still_share
    shares *= moving_share
    shares[still] = (1 - moving_share) / max(1, still.sum())
    return shares / shares.sum()


def _capped(shares: np.ndarray, cap: float) -> np.ndarray:
    """Shares of sum 1 with none above the cap (or above an even split, where the cap is lower than that)."""
    cap = max(cap, 1 / np.count_nonzero(shares))
    over = np.zeros(len(shares), dtype=bool)
    while True:
        # What those over the cap lose goes to the others, which may lift further ones over it.
        capped = np.where(over, cap, shares * (1 - cap * over.sum()) / shares[~over].sum())
        still_over = over | (capped > cap + 1e-12)
        if (still_over == over).all():
            return capped
        over = still_over
