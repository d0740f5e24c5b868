"""Which measure of `dheads eval` detects which degradation: degraded real clips are compared with the originals.

    python benchmarks/degradations.py clip.mp4 another.mp4

Prints a Markdown table with a row per measure and a column per degradation: means over the clips. Originals and
degraded clips are both encoded near-losslessly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import cv2
import numpy as np
import torch
import typer

from dheads.config import FPS, SAMPLE_RATE, AlignmentConfig
from dheads.evaluation.catalogue import CATALOGUE
from dheads.evaluation.evaluate import evaluate
from dheads.evaluation.results import Report, figure
from dheads.faces.alignment import STABLE, align_transforms, fit_similarity, mouth_box, smoothed, unwarp, warp
from dheads.faces.landmarks import load_backend
from dheads.media.reading import read_frames
from dheads.media.sound import load_waveform
from dheads.media.writing import write_clip

LATE = 5  # frames
STEADY_FRAMES = 1.5  # over which landmarks are smoothed where the head is held: they tremble, and the head does not


@dataclass(frozen=True)
class Clip:
    """A real clip."""

    frames: np.ndarray  # (F, H, W, 3) uint8
    landmarks: np.ndarray  # (F, 68, 2) px
    sound: torch.Tensor  # (N,) at 16 kHz


# ---- Degradations ----

Degraded = tuple[np.ndarray, torch.Tensor]  # frames and sound, as in Clip


def nothing(clip: Clip) -> Degraded:
    return clip.frames, clip.sound


def late_sound(clip: Clip) -> Degraded:
    """Sound that is 5 frames late, as in a player that shows the picture too early."""
    delay = torch.zeros(LATE * SAMPLE_RATE // FPS)
    return clip.frames, torch.cat([delay, clip.sound])[: len(clip.sound)]


def late_picture(clip: Clip) -> Degraded:
    """A picture that is 3 frames late."""
    return np.concatenate([clip.frames[:1].repeat(3, axis=0), clip.frames[:-3]]), clip.sound


def blurred(clip: Clip) -> Degraded:
    sigma = 2 * clip.frames.shape[1] / 256
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in clip.frames]), clip.sound


def noisy(clip: Clip) -> Degraded:
    noise = np.random.default_rng(0).normal(0, 8, clip.frames.shape)
    return (clip.frames + noise).round().clip(0, 255).astype(np.uint8), clip.sound


def frozen(clip: Clip) -> Degraded:
    return clip.frames[:1].repeat(len(clip.frames), axis=0), clip.sound


def mouth_frozen(clip: Clip) -> Degraded:
    """The mouth of the first frame, pasted into all frames."""
    alignment, size = AlignmentConfig(smooth_frames=0), 256
    matrices = align_transforms(clip.landmarks, alignment, size)
    mouth = warp(clip.frames[0], matrices[0], size)
    aligned = clip.landmarks[0] @ matrices[0][:, :2].T + matrices[0][:, 2]
    x0, y0, x1, y1 = mouth_box(aligned, size)
    mask = np.zeros((size, size, 3), np.uint8)
    mask[y0:y1, x0:x1] = 255
    mask = cv2.GaussianBlur(mask, (0, 0), 4)
    frames = []
    for frame, matrix in zip(clip.frames, matrices, strict=True):
        weight = unwarp(mask, matrix, frame.shape) / 255
        frames.append((frame * (1 - weight) + unwarp(mouth, matrix, frame.shape) * weight).round().astype(np.uint8))
    return np.stack(frames), clip.sound


def colour_drifting(clip: Clip) -> Degraded:
    """Green and blue fall to 0.8 of their value."""
    fall = np.linspace(1, 0.8, len(clip.frames))[:, None, None, None] * np.ones(3)
    fall[..., 0] = 1
    return (clip.frames * fall).round().astype(np.uint8), clip.sound


def trembling(clip: Clip) -> Degraded:
    """Each frame is shifted at random by up to 2 of 256 px."""
    reach = 2 * clip.frames.shape[1] / 256
    shifts = np.random.default_rng(0).uniform(-reach, reach, (len(clip.frames), 2))
    frames = [
        cv2.warpAffine(frame, np.array([[1, 0, x], [0, 1, y]]), frame.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
        for frame, (x, y) in zip(clip.frames, shifts, strict=True)
    ]
    return np.stack(frames), clip.sound


def widening(clip: Clip) -> Degraded:
    """The picture grows wider by an eighth, which changes the face's shape."""
    height, width = clip.frames.shape[1:3]
    frames = []
    for frame, factor in zip(clip.frames, np.linspace(1, 1.125, len(clip.frames)), strict=True):
        matrix = np.array([[factor, 0, (1 - factor) * width / 2], [0, 1, 0]])
        frames.append(cv2.warpAffine(frame, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE))
    return np.stack(frames), clip.sound


def head_frozen(clip: Clip) -> Degraded:
    """Each frame is moved, turned and scaled until the head is where it is in the first one; it still looks aside."""
    steady = smoothed(clip.landmarks.astype(np.float64), STEADY_FRAMES)[:, STABLE]
    return _moved(clip.frames, fit_similarity(steady, steady[0])), clip.sound


def head_wobbling(clip: Clip) -> Degraded:
    """The picture sways by 3 % of its width about twice in three seconds, and turns by 3 degrees about three times."""
    height, width = clip.frames.shape[1:3]
    seconds = np.arange(len(clip.frames)) / FPS
    sway, angle = 0.03 * width * np.sin(2 * np.pi * 0.7 * seconds), 3 * np.sin(2 * np.pi * 1.1 * seconds)
    matrices = [cv2.getRotationMatrix2D((width / 2, height / 2), turn, 1) for turn in angle.tolist()]
    return _moved(clip.frames, np.stack(matrices) + sway[:, None, None] * np.array([[0, 0, 1], [0, 0, 0]])), clip.sound


def _moved(frames: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """Frames (F, H, W, 3), each moved by its transform (2, 3)."""
    size = frames.shape[2], frames.shape[1]
    return np.stack(
        [
            cv2.warpAffine(frame, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
            for frame, matrix in zip(frames, matrices, strict=True)
        ]
    )


DEGRADATIONS: dict[str, Callable[[Clip], Degraded]] = {
    "none": nothing,
    f"sound {LATE} frames late": late_sound,
    "picture 3 frames late": late_picture,
    "blurred": blurred,
    "noisy": noisy,
    "frozen": frozen,
    "mouth frozen": mouth_frozen,
    "colour drifts": colour_drifting,
    "trembles": trembling,
    "grows wider": widening,
    "head frozen": head_frozen,
    "head wobbles": head_wobbling,
}

# ---- Measures ----


def main(
    clips: Annotated[list[Path], typer.Argument(help="Videos of one talking face.")],
    frames: Annotated[int, typer.Option(help="Only so many frames of each clip.")] = 75,
) -> None:
    """Measure degraded copies of real clips."""
    with TemporaryDirectory() as folder:
        print(table(measure(clips, frames, Path(folder))))


def measure(clips: list[Path], frames: int, folder: Path, names: list[str] | None = None) -> dict[str, Report]:
    """The report of each degradation of `names`, by default of all. The degraded clips stay in `folder`."""
    chosen = names or list(DEGRADATIONS)
    backend = load_backend("mesh")
    for index, path in enumerate(clips):
        pictures = np.stack(list(islice(read_frames(path), frames)))
        sound = load_waveform(path)[: len(pictures) * SAMPLE_RATE // FPS]
        clip = Clip(pictures, backend.track(pictures), sound)
        for name in ["none", *chosen]:
            target = folder / name / f"{index}_{path.stem}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_clip(target, *DEGRADATIONS[name](clip))
    return {name: evaluate(folder / name, folder / "none", progress=False) for name in chosen}


def table(reports: dict[str, Report]) -> str:
    """Markdown; the rows are the measures that have a value, in the order of the catalogue."""
    lines = ["| measure | " + " | ".join(reports) + " |", "|---|" + "---|" * len(reports)]
    for name, known in CATALOGUE.items():
        cells = [figure(report.summary.get(name)) for report in reports.values()]
        if any(cells):
            lines.append(f"| {known.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
