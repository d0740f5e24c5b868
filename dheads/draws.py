"""The examples of training steps: which clip, which frames, and the tensors that the network is trained on."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from dheads.augment import augment
from dheads.blinks import SHUT
from dheads.conditioning import motion_indices, window
from dheads.config import Config
from dheads.data import Clip, Dataset
from dheads.errors import DheadsError
from dheads.video import to_unit

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
    clip: str
    frames: np.ndarray  # (2 + M, H, W, 3) uint8: target, identity, motion frames; then M before these for roll-outs
    audio: Tensor  # (1, A, D) of the target; or (M + 1, A, D) of the motion frames and the target
    lips: Tensor  # (1 or M + 1, A', 3)
    boxes: Tensor  # (2, 4): mouth, eyes
    eyes: Tensor  # (1 or M + 1, A'', 1)
    leads: bool  # whether the network is to draw its motion frames


class Draws:
    """Draws batches from clips; a step's batches together are `parts`, numbered from 0, each a process's or a turn's.

    Example n of the run has random numbers of its own, so that a resumed run draws what the unbroken one would, and
    the same examples make up a step however it is split into parts.
    """

    broken: dict[str, str]  # clip -> why it could not be read, in the order found

    def __init__(self, dataset: Dataset, clips: list[Clip], config: Config, parts: int = 1) -> None:
        training = config.training
        self._dataset, self._clips, self._config, self._parts = dataset, clips, config, parts
        self._cumulative = None  # by clip: the probability of drawing it or one before it
        if training.balance == "speakers":
            shares = _shares(clips, training.still_share, training.speaker_cap, training.source_cap)
            self._cumulative = np.cumsum(shares)
            self._cumulative /= self._cumulative[-1]
        self._of_speaker: dict[str, list[Clip]] = defaultdict(list)
        for clip in clips:
            self._of_speaker[clip.speaker].append(clip)
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
        examples = [self._example(n) for n in self._numbers(step, part)]
        frames = to_unit(np.stack([example.frames for example in examples]))  # (B, 2 + M, 3, H, W)
        boxes = torch.stack([example.boxes for example in examples])  # (B, 2, 4)
        if self._config.training.augment:
            seed = int(self._rng(_AUGMENT, step * self._parts + part).integers(2**62))
            frames, boxes = augment(frames, boxes, torch.Generator().manual_seed(seed))
        count = self._config.conditioning.motion_frames
        audio = torch.stack([example.audio for example in examples])  # (B, 1 or M + 1, A, D)
        lips = torch.stack([example.lips for example in examples])
        eyes = torch.stack([example.eyes for example in examples])
        index = torch.tensor([place for place, example in enumerate(examples) if example.leads])
        lead = None
        if len(index):
            windows = (values[index, :-1] for values in (audio, lips, eyes))
            lead = Lead(index, frames[index, 2 + count :], *windows)
        return Batch(
            target=frames[:, 0],
            identity=frames[:, 1],
            motion_frames=frames[:, 2 : 2 + count],
            audio_window=audio[:, -1],
            lip_window=lips[:, -1],
            mouth_box=boxes[:, 0],
            eye_window=eyes[:, -1],
            eye_box=boxes[:, 1],
            clips=[example.clip for example in examples],
            lead=lead,
        )

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
        return training.rollout_share > 0 and step >= training.rollout_from * training.steps

    def _note_failure(self, clip: Clip, error: DheadsError) -> None:
        with self._lock:
            if clip.clip not in self.broken:
                self.broken[clip.clip] = str(error)
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                raise DheadsError(
                    f"{self._dataset.root}: {_MAX_FAILURES} clips in a row could not be read (the last: {error}); is "
                    "the folder still there, and its disk mounted? Then give the same command to go on"
                ) from error

    def _read(self, clip: Clip, rng: np.random.Generator, n: int) -> _Example:
        told, training = self._config.conditioning, self._config.training
        target, identity = _frames(clip.frames, told.identity_frame == "first", rng)
        label = self._dataset.labels(clip)
        shut = (label["eye_code"][:, 0] < SHUT).nonzero()[:, 0]
        shut = shut[shut != identity]
        if training.blink_share and len(shut) and rng.random() < training.blink_share:
            target = int(shut[rng.integers(len(shut))])
        # As at the start of a video, at any frame.
        starts = training.start_share > 0 and rng.random() < training.start_share
        late, count = self._late(n), told.motion_frames
        before = motion_indices(0 if starts else target, 2 * count if late else count)
        wanted = [target, None, *before[-count:], *before[:-count]]  # None: the identity
        pictures = self._dataset.pictures(clip, [identity if k is None else k for k in wanted])
        if (other := self._other(clip, n)) is not None:
            pictures[[place for place, k in enumerate(wanted) if k is None]] = other
        leads = late and before[-count] is not None and self._rng(_ROLLOUT, n).random() < training.rollout_share
        asked = torch.arange(target - count if late else target, target + 1)
        if label["speech"].shape[1] != told.speech_dim:
            raise DheadsError(
                f"{clip.clip}: has {label['speech'].shape[1]} values of speech a frame instead of {told.speech_dim}; "
                "prepare the data again"
            )
        # A photo has no sound, as where training.audio_dropout takes it away: told silence, the network would learn
        # that whoever falls silent looks as in their photo.
        voices = [label["speech"], *(label["speech_at_tempos"] if training.augment else [])]
        speech = voices[self._rng(_VOICE, n).integers(len(voices))]
        speech = speech if clip.frames > 1 else torch.zeros_like(speech)
        return _Example(
            clip.clip,
            pictures,
            window(speech, asked, told.audio_context),
            window(label["centred_lips"], asked, told.lip_context),
            torch.stack([label["mouth_box"][target], label["eye_box"][target]]),
            window(label["eye_code"], asked, told.eye_context),
            leads,
        )

    def _other(self, clip: Clip, n: int) -> np.ndarray | None:
        """In some examples a picture (H, W, 3) of the speaker in another clip: a photo smiles where its video does
        not."""
        rng, share = self._rng(_OTHER, n), self._config.training.other_clip_share
        if clip.frames == 1 or rng.random() >= share:
            return None
        others = [one for one in self._of_speaker[clip.speaker] if one is not clip]
        if not others:
            return None
        other = others[rng.integers(len(others))]
        try:
            return self._dataset.pictures(other, [int(rng.integers(other.frames))])[0]
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


def prefetch(draws: Draws, keys: Iterable[tuple[int, int]], threads: int) -> Iterator[Batch]:
    """The batches of those (step, part), in order, made ahead by that many threads.

    `keys` may be endless. What a draw raises is raised in its turn. Closing the iterator ends the threads.
    """
    pool = ThreadPoolExecutor(threads, "draw", initializer=torch.set_num_threads, initargs=(1,))
    try:
        remaining = iter(keys)
        ahead: deque[Future[Batch]] = deque(pool.submit(draws.draw, *key) for key in islice(remaining, 2 * threads))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(draws.draw, *key) for key in islice(remaining, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


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
