"""`dheads sample`: one face photo and one recording to a talking-head video."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dheads.audio import load_speech_encoder, load_waveform
from dheads.config import FPS, Config, SamplingConfig
from dheads.engine import Engine
from dheads.errors import DheadsError
from dheads.faces import align_transforms, warp
from dheads.landmarks import find_face, load_backend
from dheads.lockstep import Talk, perform
from dheads.photos import load_photo
from dheads.video import write_video
from dheads.weights import load_model


@dataclass(frozen=True)
class Result:
    """One finished video."""

    path: Path
    frames: int
    seconds: float  # length of the video
    sampling_seconds: float
    notes: list[str] = field(default_factory=list)  # what the user should know, such as several faces in the photo


def sample(
    face: Path,
    audio: Path,
    output: Path,
    *,
    weights: str = "small",
    steps: int | None = None,
    solver: str | None = None,
    seed: int = 0,
    device: str = "auto",
    size: int | None = None,
    compiled: bool = False,
    progress: bool = True,
) -> Result:
    """Write to `output` an MP4 in which the person of the photo `face` speaks the recording `audio`.

    `steps` and `solver` default to what the weights recommend, `size` (px, even) to the weights' own. The same seed on
    the same device gives the same video. `compiled`: by torch.compile, which takes a minute before it is faster.
    Raises DheadsError for input that cannot be used; then nothing is written.
    """
    if not output.parent.is_dir():
        raise DheadsError(f"{output}: the folder {output.parent} does not exist; create it or choose another")
    place = resolve_device(device)
    unet, config, _ = load_model(weights, place, progress)
    sampling = chosen(config.sampling, steps=steps, solver=solver)
    if sampling.steps > config.diffusion.num_steps:
        raise DheadsError(
            f"{weights}: was trained with {config.diffusion.num_steps} timesteps, which cannot be walked in "
            f"{sampling.steps} steps"
        )
    photo, notes = aligned_photo(face, config)
    waveform = load_waveform(audio)
    speech = load_speech_encoder(config.conditioning.speech_encoder, place, progress).encode(waveform).cpu()
    frames = generate(Engine(unet, sampling, compiled=compiled), photo, speech, seed=seed)
    start = time.monotonic()
    # Closed also when writing fails, so that the error begins a line of its own.
    with tqdm(frames, total=len(speech), desc="sample", unit="frame", disable=not progress) as bar:
        try:
            count = write_video(output, (enlarge(frame, size) for frame in bar), audio)
        except _compile_errors(compiled) as error:
            reason = str(error).strip().splitlines()[0]
            raise DheadsError(
                f"torch.compile fails here ({reason}); install a C++ compiler, or do not compile"
            ) from error
    return Result(output, count, count / FPS, time.monotonic() - start, notes)


def generate(
    engine: Engine, photo: np.ndarray, speech: Tensor, *, seed: int = 0, lips: Tensor | None = None
) -> Iterator[np.ndarray]:
    """Yield the frames, (H, W, 3) uint8, of the aligned `photo` (H, W, 3) speaking `speech` (F, D) (paper section 3.5).

    `lips`: normalised lip codes (F, L) in place of those predicted from the speech.
    """
    for _, frame in perform(engine, [Talk(photo, speech, seed, lips)]):
        yield frame


def _compile_errors(compiled: bool) -> tuple[type[Exception], ...]:
    if not compiled:
        return ()
    from torch._dynamo.exc import TorchDynamoException  # takes a second to load

    return (TorchDynamoException,)


def chosen(sampling: SamplingConfig, **wanted: Any) -> SamplingConfig:
    """The weights' own settings, but for those that are given."""
    return dataclasses.replace(sampling, **{name: value for name, value in wanted.items() if value is not None})


def aligned_photo(path: Path, config: Config) -> tuple[np.ndarray, list[str]]:
    """The face of a photo cropped and turned as the weights' alignment wants it, (H, W, 3) uint8, and notes."""
    image = load_photo(path)
    face, count = find_face(image, load_backend(config.alignment.landmarks), str(path))
    notes = [f"{path} shows {count} faces; taking the largest"] if count > 1 else []
    matrix = align_transforms(face.landmarks[None], config.alignment, config.model.image_size)[0]
    return warp(image, matrix, config.model.image_size), notes


def enlarge(frame: np.ndarray, size: int | None) -> np.ndarray:
    """A square frame at `size` px; None keeps it."""
    if size is None or size == len(frame):
        return frame
    return cv2.resize(frame, (size, size), interpolation=cv2.INTER_LANCZOS4)


def resolve_device(name: str) -> torch.device:
    """The device of that name; auto: CUDA, else MPS, else the CPU. Raises DheadsError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(name, False):
        raise DheadsError(f"device {name} is not available here; use {' or '.join(k for k, v in present.items() if v)}")
    return torch.device(name)
