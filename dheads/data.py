"""The prepared dataset: its format on disk, and batches drawn from it.

dataset.toml                     format version, size, fps, alignment recipe, speech encoder, counts, licence
clips.csv                        clip, speaker, split, frames, source
failed.csv                       source, reason
clips/<speaker>/<clip>.mp4       aligned square RGB at 25 fps, every frame a key frame, with its 16 kHz sound
clips/<speaker>/<clip>.safetensors   speech (F, D), landmarks (F, 68, 2), mouth_box (F, 4), lips (F, 3)
"""

from __future__ import annotations

import csv
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dheads.augment import augment
from dheads.conditioning import motion_indices, window
from dheads.config import FPS, Config
from dheads.errors import DheadsError
from dheads.lips import MEASURES, Talk, centred
from dheads.video import read_frames, to_unit

FORMAT = 1
CLIP_COLUMNS = ("clip", "speaker", "split", "frames", "source")
_CACHE_BYTES = 6 * 2**30  # decoded frames kept in memory


@dataclass(frozen=True)
class Clip:
    """One row of clips.csv. A still photo is a clip of one frame."""

    clip: str
    speaker: str
    split: str
    frames: int
    source: str


@dataclass(frozen=True)
class Batch:
    """Training examples; frames in [-1, 1]."""

    target: Tensor  # (B, 3, H, W)
    identity: Tensor  # (B, 3, H, W)
    motion_frames: Tensor  # (B, M, 3, H, W)
    audio_window: Tensor  # (B, A, D)
    lip_window: Tensor  # (B, A', 3) centred measures
    mouth_box: Tensor  # (B, 4) half-open px, of the target
    clips: list[str]


class Dataset:
    """A prepared folder. Clips are read when first needed and kept in memory while there is room."""

    def __init__(self, root: Path) -> None:
        """Raises DheadsError when `root` is not a prepared dataset of this format."""
        self.root = root
        self.info = _read_info(root / "dataset.toml")
        self.clips = _read_clips(root / "clips.csv")
        self._frames: dict[str, np.ndarray] = {}
        self._labels: dict[str, dict[str, Tensor]] = {}
        self._cached_bytes = 0

    def split(self, name: str) -> list[Clip]:
        return [clip for clip in self.clips if clip.split == name]

    def check(self, config: Config) -> None:
        """Raises DheadsError unless the clips were prepared as `config` asks."""
        wanted = dataset_info(config)
        for key, value in wanted.items():
            if self.info.get(key) != value:
                raise DheadsError(
                    f"{self.root}: prepared with {key} = {self.info.get(key)!r}, but the configuration wants "
                    f"{value!r}; prepare the data again with the same preset"
                )

    def labels(self, clip: Clip) -> dict[str, Tensor]:
        """speech (F, D), landmarks (F, 68, 2), mouth_box (F, 4), lips (F, 3) of a clip, float32."""
        if clip.clip not in self._labels:
            path = self.root / "clips" / f"{clip.clip}.safetensors"
            try:
                tensors = load_file(path)
            except (OSError, SafetensorError) as error:
                raise DheadsError(f"{path}: cannot be read ({error}); prepare the data again") from error
            self._labels[clip.clip] = {name: tensor.float() for name, tensor in tensors.items()}
        return self._labels[clip.clip]

    def frames(self, clip: Clip) -> np.ndarray:
        """(F, H, W, 3) uint8."""
        if clip.clip in self._frames:
            return self._frames[clip.clip]
        path = self.root / "clips" / f"{clip.clip}.mp4"
        frames = np.stack(list(read_frames(path)))[: clip.frames]
        if len(frames) < clip.frames:
            raise DheadsError(f"{path}: holds {len(frames)} frames instead of {clip.frames}; prepare the data again")
        if self._cached_bytes + frames.nbytes <= _CACHE_BYTES:
            self._frames[clip.clip] = frames
            self._cached_bytes += frames.nbytes
        return frames

    def talks(self, split: str) -> list[Talk]:
        """Every clip of a split that moves: what LipPredictor is fitted to."""
        moving = [(clip.speaker, self.labels(clip)) for clip in self.split(split) if clip.frames > 1]
        return [Talk(speaker, label["speech"], centred(label["lips"])) for speaker, label in moving]


def dataset_info(config: Config) -> dict[str, object]:
    """What dataset.toml says about how clips were made; a model must have been trained on the same."""
    return {
        "format": FORMAT,
        "size": config.model.image_size,
        "fps": FPS,
        "speech_encoder": config.conditioning.speech_encoder,
        "lip_measures": list(MEASURES),
        "alignment": asdict(config.alignment),
    }


def draw_batch(dataset: Dataset, clips: list[Clip], config: Config, step: int) -> Batch:
    """The examples of one training step: a pure function of the seed and the step, so that a run can be resumed."""
    training, told = config.training, config.conditioning
    rng = np.random.default_rng([training.seed, step])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    chosen = rng.choice(len(clips), training.batch_size, p=_shares(clips, training.still_share, training.speaker_cap))
    frames, audio, lips, boxes = [], [], [], []
    for clip in (clips[int(index)] for index in chosen):
        target, identity = rng.integers(clip.frames), rng.integers(clip.frames)
        motion = [identity if k is None else k for k in motion_indices(int(target), told.motion_frames)]
        label = dataset.labels(clip)
        frames.append(dataset.frames(clip)[[target, identity, *motion]])
        audio.append(window(label["speech"], int(target), told.audio_context))
        lips.append(window(centred(label["lips"]), int(target), told.lip_context))
        boxes.append(label["mouth_box"][target])
    stacked, box = to_unit(np.stack(frames)), torch.stack(boxes)  # (B, 2 + M, 3, H, W), (B, 4)
    if training.augment:
        stacked, box = augment(stacked, box, generator)
    return Batch(
        target=stacked[:, 0],
        identity=stacked[:, 1],
        motion_frames=stacked[:, 2:],
        audio_window=torch.stack(audio),
        lip_window=torch.stack(lips),
        mouth_box=box,
        clips=[clips[int(index)].clip for index in chosen],
    )


def _shares(clips: list[Clip], still_share: float, speaker_cap: float) -> np.ndarray:
    """The probability of drawing each clip: speakers by the root of their clips' number, none above the cap."""
    still = np.array([clip.frames == 1 for clip in clips])
    speakers, index = np.unique([clip.speaker for clip in clips], return_inverse=True)
    counts = np.bincount(index[~still], minlength=len(speakers))  # of clips that move
    by_speaker = np.sqrt(counts)
    if by_speaker.sum() > 0:
        by_speaker = _capped(by_speaker / by_speaker.sum(), speaker_cap)
    moving_share = 1.0 if not still.any() else 0.0 if still.all() else 1 - still_share
    shares = moving_share * (by_speaker / np.maximum(1, counts))[index]
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


def _read_info(path: Path) -> dict[str, object]:
    try:
        info = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DheadsError(
            f"{path.parent}: is no prepared dataset (no dataset.toml); run dheads prepare first"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DheadsError(f"{path}: cannot be read ({error}); prepare the data again") from error
    if info.get("format") != FORMAT:
        raise DheadsError(
            f"{path}: format {info.get('format')!r} is not the known one, {FORMAT}; prepare the data again"
        )
    return info


def _read_clips(path: Path) -> list[Clip]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        clips = [Clip(r["clip"], r["speaker"], r["split"], int(r["frames"]), r["source"]) for r in rows]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:  # TypeError: a row cut short
        raise DheadsError(f"{path}: cannot be read ({error}); prepare the data again") from error
    for clip in clips:
        # A dataset from elsewhere must not make us read outside its folder.
        if Path(clip.clip).is_absolute() or ".." in Path(clip.clip).parts or clip.frames < 1:
            raise DheadsError(f"{path}: {clip.clip!r} is not a valid clip; prepare the data again")
    return clips
