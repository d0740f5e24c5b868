"""One raw clip -> an aligned clip with its labels: faces are detected, aligned and measured, speech is encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from dheads.config import FPS, Config
from dheads.dataset.screening import screen, screen_sync
from dheads.dataset.sources import Source
from dheads.errors import DheadsError
from dheads.faces.alignment import (
    align_transforms,
    apply_transform,
    framed,
    lip_thickness,
    mouth_box,
    mouth_opening,
    mouth_width,
)
from dheads.faces.eyelids import openness_of_frame
from dheads.faces.landmarks import find_face, load_backend
from dheads.media.photos import PHOTOS, load_photo
from dheads.media.reading import read_frames
from dheads.media.sound import SAMPLES_PER_FRAME, delayed, frame_count, load_waveform
from dheads.speech.encoders import load_speech_encoder
from dheads.speech.sync import ENCODER, LipSync, Sync

_KEPT_BYTES = 512 * 2**20  # of pictures, in each worker process


@dataclass(frozen=True)
class Extract:
    """A clip of F frames to write."""

    frames: Iterator[tuple[np.ndarray, float]]  # (size, size, 3) uint8 and the eyes' openness there, made one by one
    waveform: torch.Tensor  # (N,) 16 kHz
    labels: dict[str, torch.Tensor]  # speech (F, D), landmarks (F, 68, 2) px, mouth_box (F, 4) px, lips (F, 3),
    # speech_at_tempos (V, F, D) of clips that move
    sync: Sync | None = None  # how far off the raw clip is; None where it was not measured

    def __len__(self) -> int:
        return len(self.labels["speech"])


class Pictures:
    """The pictures of one file, for several passes: decoded once if they are few enough to keep, else at each pass."""

    def __init__(self, read: Callable[[], Iterator[np.ndarray]]) -> None:
        self._read = read
        self._kept: list[np.ndarray] | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[np.ndarray] = []
        room = _KEPT_BYTES
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
        """Raises DheadsError where a network cannot be loaded, and for an encoder of another size than configured."""
        cond = config.conditioning
        self.config = config
        self.backend = load_backend(config.alignment.landmarks, device)
        self.encoder = load_speech_encoder(cond.speech_encoder, device, progress)
        if self.encoder.dim != cond.speech_dim:
            raise DheadsError(
                f"the speech encoder {cond.speech_encoder!r} gives {self.encoder.dim} numbers a frame, not "
                f"{cond.speech_dim}; set conditioning.speech_dim={self.encoder.dim}"
            )
        self._lip_sync = LipSync() if cond.speech_encoder == ENCODER else None

    def __call__(self, raw: Path, source: Source) -> Extract:
        """Extract one clip. Raises DheadsError with the reason why a file cannot be used."""
        path, is_photo = raw / source.name, Path(source.name).suffix.lower() in PHOTOS
        pictures = Pictures(lambda: iter([load_photo(path)]) if is_photo else read_frames(path))
        if is_photo:
            found, waveform = self._photo(pictures, path)
        else:
            found, waveform = self._video(pictures, raw / (source.sound or source.name))
        landmarks = screen(found, self.config.preparation)
        size = self.config.network.image_size
        matrices = align_transforms(landmarks, self.config.alignment, size)

        aligned = np.stack([apply_transform(matrix, row) for matrix, row in zip(matrices, landmarks, strict=True)])
        waveform, speech, sync = self.in_step(waveform, aligned)
        labels = make_labels(speech, aligned, size)
        count, tempos = len(landmarks), self.config.preparation.speech_tempos
        if tempos and not is_photo:
            voices = [self.encoder.encode_at(tempo, waveform, count) for tempo in tempos]
            labels["speech_at_tempos"] = torch.stack(voices).half().cpu()
        return Extract(
            # The eyes are measured in the same pass, so that a long video is decoded twice and not three times.
            frames=(
                (framed(image, matrix, size), openness_of_frame(image, row))
                for image, matrix, row in zip(islice(pictures, len(landmarks)), matrices, landmarks, strict=True)
            ),
            waveform=waveform,
            labels=labels,
            sync=sync,
        )

    def in_step(self, waveform: torch.Tensor, landmarks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, Sync | None]:
        """The sound of F frames, shifted so that it is in step with the lips; its embeddings; and how far off it was.

        waveform: (N,), all of the file's sound. Raises DheadsError for lips that do not go with the sound.
        """
        count = len(landmarks)
        speech = self.encoder.encode(waveform[: count * SAMPLES_PER_FRAME], count)
        sync = self._lip_sync(speech, mouth_opening(landmarks)) if self._lip_sync else None
        if sync is not None:
            screen_sync(sync, self.config.preparation)
            if sync.is_off:
                waveform = delayed(waveform, sync.offset_seconds)
                speech = self.encoder.encode(waveform[: count * SAMPLES_PER_FRAME], count)
        return waveform[: count * SAMPLES_PER_FRAME], speech, sync

    def _photo(self, pictures: Pictures, path: Path) -> tuple[np.ndarray, torch.Tensor]:
        face, _ = find_face(next(iter(pictures)), self.backend, str(path))
        return face.landmarks[None], torch.zeros(SAMPLES_PER_FRAME)

    def _video(self, pictures: Pictures, sound: Path) -> tuple[np.ndarray, torch.Tensor]:
        """Landmarks (F, 68, 2) px, NaN where no face is found, and the sound, which may be longer than F frames."""
        waveform = load_waveform(sound)
        landmarks = self.backend.track(iter(pictures))
        lengths = {"picture": len(landmarks), "sound": frame_count(len(waveform))}
        count = common_length(lengths, self.config.preparation.max_skew_seconds)
        return landmarks[:count], waveform


def common_length(lengths: dict[str, int], max_skew_seconds: float) -> int:
    """The number of frames that all parts of a clip have; `lengths` has each part's number by its name.

    Raises DheadsError for parts that differ by more than `max_skew_seconds`, and for an empty one.
    """
    shortest, longest = min(lengths.values()), max(lengths.values())
    if (longest - shortest) / FPS > max_skew_seconds:
        *others, last = lengths
        skew = (longest - shortest) / FPS
        raise DheadsError(f"{', '.join(others)} and {last} differ in length by {skew:.2f} s")
    if shortest == 0:
        raise DheadsError("it has no frame")
    return shortest


def make_labels(speech: torch.Tensor, landmarks: np.ndarray, size: int) -> dict[str, torch.Tensor]:
    """The labels of a clip, as in `Extract`.

    speech: (F, D). landmarks: (F, 68, 2) px of the aligned frames. size: px, of a side of the frames.
    Raises DheadsError for numbers that are not finite.
    """
    labels = {
        "speech": speech.half().cpu(),
        "landmarks": torch.from_numpy(landmarks.astype(np.float32)),
        "mouth_box": torch.from_numpy(mouth_box(landmarks, size)).int(),
        "lips": torch.from_numpy(_lip_measures(landmarks)),
    }
    for name, label in labels.items():
        if not label.isfinite().all():
            raise DheadsError(f"not all numbers of its {name} are finite")
    return labels


def _lip_measures(landmarks: np.ndarray) -> np.ndarray:
    """(F, 68, 2) -> (F, 3) float32: opening, width and thickness (lips.MEASURES), in eye distances."""
    measures = [mouth_opening(landmarks), mouth_width(landmarks), lip_thickness(landmarks)]
    return np.stack(measures, axis=-1).astype(np.float32)
