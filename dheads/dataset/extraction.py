"""One raw clip -> an aligned clip with its labels: detected and encoded, or imported from the released layout."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch

from dheads.config import FPS, Config
from dheads.dataset.layouts import Source
from dheads.dataset.screening import screen
from dheads.errors import DheadsError
from dheads.faces.alignment import (
    align_transforms,
    apply_transform,
    framed,
    lip_thickness,
    mouth_box,
    mouth_opening,
    mouth_width,
    scale_points,
)
from dheads.faces.eyelids import eye_openness
from dheads.faces.landmarks import find_face, load_backend
from dheads.media.photos import PHOTOS, load_photo
from dheads.media.reading import read_frames
from dheads.media.sound import SAMPLES_PER_FRAME, frame_count, load_waveform
from dheads.speech.encoders import load_speech_encoder

_KEPT_BYTES = 512 * 2**20  # of pictures, in each worker process


@dataclass(frozen=True)
class Extract:
    """A clip of F frames, ready to be written."""

    frames: Iterator[np.ndarray]  # F times (size, size, 3) uint8, made as they are asked for
    waveform: torch.Tensor  # (N,) 16 kHz
    labels: dict[str, torch.Tensor]  # speech (F, D), landmarks (F, 68, 2) px, mouth_box (F, 4) px, lips (F, 3),
    # eyes (F,), speech_at_tempos (V, F, D) of clips that move

    def __len__(self) -> int:
        return len(self.labels["speech"])


class _Pictures:
    """The pictures of one file, as often as they are asked for: decoded once where they are few enough to be kept."""

    def __init__(self, read: Callable[[], Iterator[np.ndarray]]) -> None:
        self._read = read
        self._kept: list[np.ndarray] | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._kept is not None:
            yield from self._kept
            return
        kept, room = [], _KEPT_BYTES
        for picture in self._read():
            room -= picture.nbytes
            if room >= 0:
                kept.append(picture)
            elif kept:
                kept = []
            yield picture
        if room >= 0:
            self._kept = kept


class Detector:
    """Finds and aligns faces, and encodes speech."""

    def __init__(self, config: Config, device: str, progress: bool = True) -> None:
        """Raises DheadsError where the networks cannot be had, and for an encoder of another size than configured."""
        told = config.conditioning
        self.config = config
        self.backend = load_backend(config.alignment.landmarks, device)
        self.encoder = load_speech_encoder(told.speech_encoder, device, progress)
        if self.encoder.dim != told.speech_dim:
            raise DheadsError(
                f"the speech encoder {told.speech_encoder!r} gives {self.encoder.dim} numbers a frame, not "
                f"{told.speech_dim}; set conditioning.speech_dim={self.encoder.dim}"
            )

    def __call__(self, raw: Path, source: Source) -> Extract:
        """Raises DheadsError with the reason why a file cannot be used."""
        path, is_photo = raw / source.name, Path(source.name).suffix.lower() in PHOTOS
        pictures = _Pictures(lambda: iter([load_photo(path)]) if is_photo else read_frames(path))
        if is_photo:
            found, waveform = self._photo(pictures, path)
        else:
            found, waveform = self._video(pictures, raw / (source.sound or source.name))
        landmarks = screen(found, self.config.preparation)
        size = self.config.network.image_size
        matrices = align_transforms(landmarks, self.config.alignment, size)

        def images() -> Iterator[np.ndarray]:
            return islice(pictures, len(landmarks))

        aligned = np.stack([apply_transform(matrix, row) for matrix, row in zip(matrices, landmarks, strict=True)])
        count, tempos = len(landmarks), self.config.preparation.speech_tempos
        labels = _labels(self.encoder.encode(waveform, count), aligned, eye_openness(images(), landmarks), size)
        if tempos and not is_photo:
            voices = [self.encoder.encode_at(tempo, waveform, count) for tempo in tempos]
            labels["speech_at_tempos"] = torch.stack(voices).half().cpu()
        return Extract(
            frames=(framed(image, matrix, size) for image, matrix in zip(images(), matrices, strict=True)),
            waveform=waveform,
            labels=labels,
        )

    def _photo(self, pictures: _Pictures, path: Path) -> tuple[np.ndarray, torch.Tensor]:
        face, _ = find_face(next(iter(pictures)), self.backend, str(path))
        return face.landmarks[None], torch.zeros(SAMPLES_PER_FRAME)

    def _video(self, pictures: _Pictures, sound: Path) -> tuple[np.ndarray, torch.Tensor]:
        """Landmarks (F, 68, 2) px, NaN where no face is seen, and the sound, F frames of each."""
        waveform = load_waveform(sound)
        landmarks = self.backend.track(iter(pictures))
        lengths = {"picture": len(landmarks), "sound": frame_count(len(waveform))}
        count = _common_length(lengths, self.config.preparation.max_skew_seconds)
        return landmarks[:count], waveform[: count * SAMPLES_PER_FRAME]


class Importer:
    """Takes what the released code trains on: videos of aligned faces, their landmarks, and speech embeddings."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, raw: Path, source: Source) -> Extract:
        """Raises DheadsError with the reason why a file cannot be used."""
        if source.landmarks is None or source.embeddings is None:
            raise DheadsError("it has no landmarks or no embeddings")
        path, limits = raw / source.name, self.config.preparation
        waveform = load_waveform(raw / (source.sound or source.name))
        landmarks = _load_landmarks(raw / source.landmarks)
        speech = _load_embeddings(raw / source.embeddings, self.config.conditioning.speech_dim)
        pictures = _Pictures(lambda: read_frames(path))
        shapes = [image.shape for image in pictures]
        lengths = {"picture": len(shapes), "sound": frame_count(len(waveform))}
        lengths |= {"landmarks": len(landmarks), "embeddings": len(speech)}
        count = _common_length(lengths, limits.max_skew_seconds)
        # What is not square is stretched, as the released code does.
        size, (height, width, _) = self.config.network.image_size, shapes[0]
        scaled = scale_points(screen(landmarks[:count], limits), np.array([size / width, size / height]))

        def resized() -> Iterator[np.ndarray]:
            return (_resized(image, size) for image in islice(pictures, count))

        return Extract(
            frames=resized(),
            waveform=waveform[: count * SAMPLES_PER_FRAME],
            labels=_labels(speech[:count], scaled, eye_openness(resized(), scaled), size),
        )


def _common_length(lengths: dict[str, int], max_skew_seconds: float) -> int:
    """The number of frames that all parts of a clip have."""
    shortest, longest = min(lengths.values()), max(lengths.values())
    if (longest - shortest) / FPS > max_skew_seconds:
        *others, last = lengths
        skew = (longest - shortest) / FPS
        raise DheadsError(f"{', '.join(others)} and {last} differ in length by {skew:.2f} s")
    if shortest == 0:
        raise DheadsError("it has no frame")
    return shortest


def _labels(speech: torch.Tensor, landmarks: np.ndarray, eyes: np.ndarray, size: int) -> dict[str, torch.Tensor]:
    labels = {
        "speech": speech.half().cpu(),
        "landmarks": torch.from_numpy(landmarks.astype(np.float32)),
        "mouth_box": torch.from_numpy(mouth_box(landmarks, size)).int(),
        "lips": torch.from_numpy(lip_measures(landmarks)),
        "eyes": torch.from_numpy(_known_throughout(eyes)),
    }
    for name, label in labels.items():
        if not label.isfinite().all():
            raise DheadsError(f"not all numbers of its {name} are finite")
    return labels


def _known_throughout(openness: np.ndarray) -> np.ndarray:
    """(F,) float32: where the eyes are too small to see, they are as open as in the median frame."""
    seen = openness[np.isfinite(openness)]
    return np.where(np.isfinite(openness), openness, np.median(seen) if len(seen) else 1.0).astype(np.float32)


def lip_measures(landmarks: np.ndarray) -> np.ndarray:
    """(F, 68, 2) -> (F, 3) float32: opening, width and thickness (dheads.lips.MEASURES), in eye distances."""
    measures = [mouth_opening(landmarks), mouth_width(landmarks), lip_thickness(landmarks)]
    return np.stack(measures, axis=-1).astype(np.float32)


# --- The released layout's files -------------------------------------------------------------------------------------


def _load_landmarks(path: Path) -> np.ndarray:
    """(F, 68, 2) px of the video."""
    try:
        landmarks = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:  # cut off, or something else
        raise DheadsError(f"{path} cannot be read ({error}); save an array of numbers, by numpy.save") from error
    if landmarks.ndim != 3 or landmarks.shape[1] != 68 or landmarks.shape[2] not in (2, 3):
        raise DheadsError(f"{path} hold an array of {landmarks.shape} instead of (frames, 68, 2 or 3)")
    return landmarks[..., :2].astype(np.float32)


def _load_embeddings(path: Path, dim: int) -> torch.Tensor:
    """(F, D) float32."""
    try:
        speech = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:  # their own messages tell how to run the content
        raise DheadsError(f"{path} cannot be loaded safely; save a tensor alone, by torch.save") from error
    if not isinstance(speech, torch.Tensor) or speech.ndim != 2 or speech.shape[1] != dim:
        kind = tuple(speech.shape) if isinstance(speech, torch.Tensor) else type(speech).__name__
        raise DheadsError(f"{path} are {kind} instead of a tensor of (frames, {dim})")
    return speech.detach().float()


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    shrinks = max(image.shape[:2]) > size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
