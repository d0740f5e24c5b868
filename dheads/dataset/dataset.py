"""The prepared dataset: its format on disk, and what its clips hold.

dataset.toml                     format version, size, fps, alignment recipe, speech encoder, licence
clips.csv, failed.csv            see dheads.manifest
clips/<speaker>/<clip>.mp4       aligned square RGB at 25 fps, every frame a key frame, with its 16 kHz sound
clips/<speaker>/<clip>.safetensors   speech (F, D), landmarks (F, 68, 2), mouth_box (F, 4), lips (F, 3),
                                     eyes (F,), and, as preparation.speech_tempos asks, speech_at_tempos (V, F, D)
"""

from __future__ import annotations

import logging
import threading
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from dheads.config import FPS, AlignmentConfig, Config, from_dict
from dheads.dataset.manifest import Clip, clip_path, read_clips
from dheads.errors import DheadsError
from dheads.extensions.codes import CODES, Code
from dheads.extensions.head_motion import MotionClip
from dheads.extensions.lips import MEASURES, LipClip
from dheads.faces.alignment import align_transforms, framed, region_box
from dheads.faces.head_pose import head_pose
from dheads.media.colours import RGB, SCALER
from dheads.media.containers import open_container

FORMAT = 2
# A dataset of at most so many bytes is decoded once and kept: all of CREMA-D at 128 px would be 23 GB, LRW 700 GB.
_KEPT_BYTES = 6 * 2**30
_LABEL_BYTES = 4_096  # of one frame, about: 400 to 1,024 floats
_MAX_FITTED = 2_000
# Of one frame.
_LABEL_SHAPES = {"speech": None, "landmarks": (68, 2), "mouth_box": (4,), "lips": (len(MEASURES),), "eyes": ()}

log = logging.getLogger("dheads")


class Dataset:
    """A prepared folder. Safe to read from several threads.

    A small one is decoded as its clips are asked for, and kept in memory. Of a large one nothing is kept: frames are
    read by seeking, for which every frame is a key frame.
    """

    def __init__(self, root: Path | str) -> None:
        """Raises DheadsError when `root` is not a prepared dataset of this format."""
        self.root = Path(root)
        self.info = _read_info(self.root / "dataset.toml")
        self.clips = read_clips(self.root)
        self.size: int = self.info["size"]  # px, of a side of the pictures
        self.alignment = _alignment(self.root / "dataset.toml", self.info.get("alignment"))
        self._keep = self.bytes_of(self.clips) <= _KEPT_BYTES
        self._frames: dict[str, np.ndarray] = {}
        self._labels: dict[str, dict[str, Tensor]] = {}
        self._local = threading.local()

    def split(self, name: str) -> list[Clip]:
        """The clips of train, val or test."""
        return [clip for clip in self.clips if clip.split == name]

    def check(self, config: Config, larger: bool = False) -> None:
        """Raises DheadsError unless the clips were prepared as `config` asks; larger: or with larger pictures."""
        for key, value in dataset_info(config).items():
            if key == "size" and larger and self.size > config.network.image_size:
                continue
            if self.info.get(key) != value:
                raise DheadsError(
                    f"{self.root}: prepared with {key} = {self.info.get(key)!r}, but the configuration wants "
                    f"{value!r}; prepare the data again with the same preset"
                )

    def bytes_of(self, clips: Iterable[Clip]) -> int:
        """What pictures and labels of these take in memory, about."""
        return sum(clip.frames for clip in clips) * (3 * self.size**2 + _LABEL_BYTES)

    def labels(self, clip: Clip) -> dict[str, Tensor]:
        """speech (F, D), landmarks (F, 68, 2) px, mouth_box (F, 4) px, lips (F, 3), eyes (F,), pose (F, 6),
        speech_at_tempos (V, F, D), and each code (F, C) and its box (F, 4) px as `code_label` and `box_label` name
        them, float32.

        Raises DheadsError for a file that is missing, damaged or of another shape.
        """
        labels = self._labels.get(clip.clip)
        if labels is None:
            labels = _read_labels(
                clip_path(self.root, clip.clip, "safetensors"), clip.frames, self.size, self.alignment
            )
            if self._keep:
                self._labels[clip.clip] = labels
        return labels

    def frames(self, clip: Clip) -> np.ndarray:
        """All pictures of a clip, (F, H, W, 3) uint8. Raises DheadsError for a file that is missing or damaged."""
        frames = self._frames.get(clip.clip)
        if frames is None:
            frames = self.read(clip, range(clip.frames))
            if self._keep:
                self._frames[clip.clip] = frames
        return frames

    def pictures(self, clip: Clip, indices: Sequence[int]) -> np.ndarray:
        """The pictures of those indices, in that order, (n, H, W, 3) uint8. Raises DheadsError as `frames` does."""
        if self._keep:
            return self.frames(clip)[list(indices)]
        return self.read(clip, indices)

    def photo(self, clip: Clip, config: Config) -> np.ndarray:
        """The first picture of a clip, (H, W, 3) uint8, as the photo that weights of that configuration start from.

        Where heads move within the crop, it is framed as a photo is: its own face where the mean face is.
        """
        picture = self.pictures(clip, [0])[0]
        if not config.extensions.warp.flow:
            return picture
        landmarks = self.labels(clip)["landmarks"][:1].numpy()
        return framed(picture, align_transforms(landmarks, self.alignment, self.size)[0], self.size)

    def lip_clips(self, split: str) -> list[LipClip]:
        """Clips of a split that move, at every tempo, for LipPredictor.fit."""
        found = []
        for clip, labels in self._fitted_to(split):
            measures = labels[code_label(CODES["lips"])]
            for speech in (labels["speech"], *labels["speech_at_tempos"]):
                found.append(LipClip(clip.speaker, speech, measures))
        return found

    def motion_clips(self, split: str) -> list[MotionClip]:
        """Clips of a split that move, for HeadMotion.fit."""
        label = code_label(CODES["pose"])
        return [MotionClip(clip.speaker, labels[label], labels["speech"]) for clip, labels in self._fitted_to(split)]

    def _fitted_to(self, split: str) -> Iterator[tuple[Clip, dict[str, Tensor]]]:
        """Clips of a split that move and their labels: at most 2,000, evenly spread over the list.

        Those that cannot be read are left out, with a warning.
        """
        moving = [clip for clip in self.split(split) if clip.moves]
        for index in np.linspace(0, len(moving) - 1, min(len(moving), _MAX_FITTED)).round().astype(int):
            try:
                labels = self.labels(moving[index])
            except DheadsError as error:
                log.warning("%s; codes are fitted without it", error)
                continue
            yield moving[index], labels

    def read(self, clip: Clip, indices: Sequence[int]) -> np.ndarray:
        """As `pictures`, from the disk, and nothing is kept."""
        if not hasattr(self._local, "scaler"):
            self._local.scaler = VideoReformatter()  # its tables cost more than a picture; one belongs to one thread
        return _read_pictures(
            clip_path(self.root, clip.clip, "mp4"), clip.frames, self.size, indices, self._local.scaler
        )


def dataset_info(config: Config) -> dict[str, object]:
    """What dataset.toml says about how clips were made; a model must have been trained on the same."""
    return {
        "format": FORMAT,
        "size": config.network.image_size,
        "fps": FPS,
        "speech_encoder": config.conditioning.speech_encoder,
        "lip_measures": list(MEASURES),
        "alignment": asdict(config.alignment),
    }


def _read_info(path: Path) -> dict[str, Any]:
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
    if type(info.get("size")) is not int or info["size"] < 1:
        raise DheadsError(f"{path}: size {info.get('size')!r} is no number of pixels; prepare the data again")
    return info


def _alignment(path: Path, table: object) -> AlignmentConfig:
    try:
        return from_dict({"alignment": table}).alignment
    except DheadsError as error:
        raise DheadsError(f"{path}: {error}; prepare the data again") from error


def _read_pictures(path: Path, frames: int, size: int, indices: Sequence[int], scaler: VideoReformatter) -> np.ndarray:
    """Pictures (n, size, size, 3) uint8 of a prepared clip that has that many frames."""
    pictures: dict[int, np.ndarray] = {}
    try:
        # `dheads prepare` writes no other format.
        with path.open("rb") as file, open_container(file, "mp4") as container:
            stream = next((stream for stream in container.streams.video if stream.codec_context), None)
            if stream is None or stream.time_base is None:
                raise _damaged(path, "holds no video")
            stream.codec_context.thread_count = 1  # batches are made by threads of their own
            if stream.frames != frames:
                raise _damaged(path, f"holds {stream.frames} frames instead of {frames}")
            ticks = round(1 / (FPS * stream.time_base))  # a frame
            decoded, following = container.decode(stream), 0
            for index in sorted({int(index) for index in indices}):
                if index != following:
                    container.seek(index * ticks, stream=stream)
                following = index + 1
                frame = next(decoded, None)
                if frame is None or frame.pts != index * ticks or frame.is_corrupt:
                    raise _damaged(path, f"frame {index} is damaged")
                if (frame.width, frame.height) != (size, size):
                    raise _damaged(path, f"is of {frame.width} x {frame.height} px instead of {size} x {size}")
                pictures[index] = scaler.reformat(frame, format=RGB, interpolation=SCALER).to_ndarray()
    except (OSError, av.FFmpegError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    return np.stack([pictures[index] for index in indices])


def _read_labels(path: Path, frames: int, size: int, alignment: AlignmentConfig) -> dict[str, Tensor]:
    try:
        # Not load_file: it maps the file, and a mapped file that is cut or unmounted kills the process.
        stored = load(path.read_bytes())
        labels = {name: stored[name].float() for name in _LABEL_SHAPES}
        tempos = stored.get("speech_at_tempos", torch.empty(0, *labels["speech"].shape)).float()
    except (OSError, SafetensorError, KeyError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    for name, label in labels.items():
        shape = _LABEL_SHAPES[name]
        if label.shape != (frames, *(label.shape[-1:] if shape is None else shape)):
            raise _damaged(path, f"{name} is of shape {tuple(label.shape)}, for {frames} frames")
        if not label.isfinite().all():
            raise _damaged(path, f"{name} holds numbers that are not finite")
    if tempos.shape[1:] != labels["speech"].shape or not tempos.isfinite().all():
        raise _damaged(path, f"speech_at_tempos is of shape {tuple(tempos.shape)}, or not finite")
    low, high = labels["mouth_box"][:, :2], labels["mouth_box"][:, 2:]
    if not ((low >= 0) & (low < high) & (high <= size)).all():
        raise _damaged(path, "mouth_box lies outside the picture")
    landmarks = labels["landmarks"].numpy()
    labels["pose"] = torch.from_numpy(head_pose(landmarks, alignment, size))
    codes = {code_label(code): code.measured(labels) for code in CODES.values()}
    regions = {box_label(code): region_box(landmarks, code.points, size) for code in CODES.values()}
    boxes = {name: torch.from_numpy(box).float() for name, box in regions.items()}
    return {**labels, "speech_at_tempos": tempos, **codes, **boxes}


def code_label(code: Code) -> str:
    """The label that holds a code."""
    return f"{code.name}_code"


def box_label(code: Code) -> str:
    """The label that holds the box of a code's region."""
    return f"{code.name}_box"


def _damaged(path: Path, what: str) -> DheadsError:
    return DheadsError(f"{path}: {what}; prepare the data again")
