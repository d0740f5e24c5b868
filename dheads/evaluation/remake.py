"""Clips of a prepared dataset made anew: from their first frame and their own sound."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dheads.config import Config
from dheads.dataset.dataset import Dataset
from dheads.dataset.manifest import Clip, clip_path
from dheads.errors import DheadsError
from dheads.media.sound import add_noise, load_waveform
from dheads.media.writing import write_video
from dheads.sampling.engine import Engine
from dheads.sampling.lockstep import VideoSpec, in_lockstep
from dheads.speech.encoders import load_speech_encoder
from dheads.system.files import complete_or_absent

_SETTINGS = "settings.json"


def chosen_clips(dataset: Dataset, split: str, limit: int | None) -> list[Clip]:
    """The split's moving clips, those of different speakers first, so that a limit takes many people in.

    Raises DheadsError where there is none.
    """
    clips = [clip for clip in dataset.split(split) if clip.moves]
    if not clips:
        raise DheadsError(f"{dataset.root}: has no moving clip in the split {split!r}; choose train, val or test")
    turns: dict[str, int] = {}
    order = []
    for clip in clips:
        turns[clip.speaker] = turns.get(clip.speaker, 0) + 1
        order.append((turns[clip.speaker], clip.clip, clip))
    return [clip for _, _, clip in sorted(order)][:limit]


def heard_speech(dataset: Dataset, config: Config, device: torch.device, progress: bool) -> Callable[[Clip], Tensor]:
    """What a network hears of a clip, (F, D): as it was prepared, or with the noise that its weights want to hear."""
    level = config.extensions.sound.room_noise
    if not level:
        return lambda clip: dataset.labels(clip)["speech"]
    encoder = load_speech_encoder(config.conditioning.speech_encoder, device, progress)

    def heard(clip: Clip) -> Tensor:
        waveform = load_waveform(clip_path(dataset.root, clip.clip, "mp4"))
        return torch.cat([*encoder.encode_pieces(add_noise([waveform], level), clip.frames)]).cpu()

    return heard


def remake(
    engine: Engine,
    dataset: Dataset,
    clips: list[Clip],
    speech: Callable[[Clip], Tensor],
    folder: Path,
    seed: int,
    places: int,
    progress: bool,
) -> list[tuple[str, str]]:
    """Write <folder>/<clip>.mp4 for every clip that is not there yet, `places` at once, by what `speech` says is heard;
    returns (clip, reason) of the clips that cannot be read.

    A clip's pictures do not depend on what is made beside it but for the device's rounding.
    Raises DheadsError where a video cannot be written.
    """
    todo = [clip for clip in clips if not _target(folder, clip).exists()]
    taken: list[Clip] = []
    failed: list[tuple[str, str]] = []

    def videos() -> Iterator[VideoSpec]:
        for clip in todo:
            try:
                video = VideoSpec(dataset.pictures(clip, [0])[0], speech(clip), seed)
            except DheadsError as error:
                failed.append((clip.clip, str(error)))
                continue
            taken.append(clip)
            yield video

    made: dict[int, list[np.ndarray]] = {}
    frames = sum(clip.frames for clip in todo)
    with tqdm(total=frames, desc="sample", unit="frame", disable=not progress or not todo) as bar:
        for index, frame, last in in_lockstep(engine, videos(), max(1, min(places, len(todo)))):
            made.setdefault(index, []).append(frame)
            bar.update()
            if last:
                _write(folder, dataset, taken[index], made.pop(index))
    return failed


def _write(folder: Path, dataset: Dataset, clip: Clip, frames: list[np.ndarray]) -> None:
    target = _target(folder, clip)
    _make_folder(target.parent)
    # As it is: a codec must not come between what is measured of a made clip and of the true one.
    write_video(target, frames, clip_path(dataset.root, clip.clip, "mp4"), audio_codec="copy")


def _target(folder: Path, clip: Clip) -> Path:
    return folder / f"{clip.clip}.mp4"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DheadsError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Note in <folder>/settings.json how its videos are made.

    Raises DheadsError for a folder whose videos were made otherwise, as both together would be nobody's figures.
    """
    path = folder / _SETTINGS
    _make_folder(folder)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = None
    except (OSError, ValueError, RecursionError) as error:
        raise DheadsError(f"{path}: cannot be read ({error}); choose another folder") from error
    if found == settings:
        return
    if found is not None:
        known = found if isinstance(found, dict) else {}
        other = ", ".join(name for name in settings if known.get(name) != settings[name])
        raise DheadsError(f"{folder}: holds videos made with other settings ({other}); choose another folder")
    if (folder / "generated").exists():
        raise DheadsError(f"{folder}: holds videos of unknown origin (no {_SETTINGS}); choose another folder")
    with complete_or_absent(path) as part:
        part.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
