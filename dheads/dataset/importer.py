"""One clip of the released layout -> a clip with its labels. Its face is aligned and its speech encoded already."""

from __future__ import annotations

import pickle
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch

from dheads.config import Config
from dheads.dataset.extraction import Extract, Pictures, common_length, make_labels
from dheads.dataset.screening import screen
from dheads.dataset.sources import Source
from dheads.errors import DheadsError
from dheads.faces.alignment import scale_points
from dheads.faces.eyelids import openness_of_frame
from dheads.media.reading import read_frames
from dheads.media.sound import SAMPLES_PER_FRAME, frame_count, load_waveform


class Importer:
    """Imports clips of the released layout."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, raw: Path, source: Source) -> Extract:
        """Import one clip. Raises DheadsError with the reason why a file cannot be used."""
        if source.landmarks is None or source.embeddings is None:
            raise DheadsError("it has no landmarks or no embeddings")
        path, limits = raw / source.name, self.config.preparation
        waveform = load_waveform(raw / (source.sound or source.name))
        landmarks = _load_landmarks(raw / source.landmarks)
        speech = _load_embeddings(raw / source.embeddings, self.config.conditioning.speech_dim)
        pictures = Pictures(lambda: read_frames(path))
        shapes = [image.shape for image in pictures]
        lengths = {"picture": len(shapes), "sound": frame_count(len(waveform))}
        lengths |= {"landmarks": len(landmarks), "embeddings": len(speech)}
        count = common_length(lengths, limits.max_skew_seconds)
        # As in the released code, pictures that are not square are stretched.
        size, (height, width, _) = self.config.network.image_size, shapes[0]
        scaled = scale_points(screen(landmarks[:count], limits), np.array([size / width, size / height]))
        resized = (_resized(image, size) for image in islice(pictures, count))

        return Extract(
            frames=((image, openness_of_frame(image, row)) for image, row in zip(resized, scaled, strict=True)),
            waveform=waveform[: count * SAMPLES_PER_FRAME],
            labels=make_labels(speech[:count], scaled, size),
        )


def _load_landmarks(path: Path) -> np.ndarray:
    """(F, 68, 2) float32, px of the video."""
    try:
        landmarks: np.ndarray = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:  # cut off, or something else
        raise DheadsError(f"{path} cannot be read ({error}); save an array of numbers, by numpy.save") from error
    if landmarks.ndim != 3 or landmarks.shape[1] != 68 or landmarks.shape[2] not in (2, 3):
        raise DheadsError(f"{path} hold an array of {landmarks.shape} instead of (frames, 68, 2 or 3)")
    return landmarks[..., :2].astype(np.float32)


def _load_embeddings(path: Path, dim: int) -> torch.Tensor:
    """(F, D) float32."""
    try:
        speech = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:  # torch's messages explain how to run the content
        raise DheadsError(f"{path} cannot be loaded safely; save a tensor alone, by torch.save") from error
    if not isinstance(speech, torch.Tensor) or speech.ndim != 2 or speech.shape[1] != dim:
        kind = tuple(speech.shape) if isinstance(speech, torch.Tensor) else type(speech).__name__
        raise DheadsError(f"{path} are {kind} instead of a tensor of (frames, {dim})")
    return speech.detach().float()


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    shrinks = max(image.shape[:2]) > size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
