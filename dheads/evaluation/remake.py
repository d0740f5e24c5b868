"""Generating the clips of a prepared dataset from their first frame and their sound."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dheads.config import Config
from dheads.dataset.choice import alternate_speakers
from dheads.dataset.dataset import Dataset
from dheads.dataset.manifest import Clip, clip_path
from dheads.errors import DheadsError
from dheads.evaluation.results import Facts
from dheads.extensions.lips import LipPredictor
from dheads.faces.alignment import align_transforms
from dheads.media.sound import add_noise, load_waveform
from dheads.media.writing import write_video
from dheads.sampling.engine import Engine
from dheads.sampling.lockstep import VideoSpec, composed, in_lockstep
from dheads.sampling.portrait import Portrait
from dheads.sampling.staging import Stage, staged
from dheads.speech.encoders import load_speech_encoder
from dheads.system.devices import described
from dheads.system.files import complete_or_absent

log = logging.getLogger("dheads")
_SETTINGS = "settings.json"


def chosen_clips(dataset: Dataset, split: str, limit: int | None) -> list[Clip]:
    """The videos of a split, at most `limit`, of as many speakers as possible. Raises DheadsError if there is none."""
    clips = [clip for clip in dataset.split(split) if clip.moves]
    if not clips:
        raise DheadsError(f"{dataset.root}: has no moving clip in the split {split!r}; choose train, val or test")
    return alternate_speakers(clips)[:limit]


def clip_speech(dataset: Dataset, config: Config, device: torch.device, progress: bool) -> Callable[[Clip], Tensor]:
    """A function that returns a clip's speech embeddings (F, D): as prepared, or with the weights' room noise."""
    level = config.extensions.sound.room_noise
    if not level:
        return lambda clip: dataset.labels(clip)["speech"]
    encoder = load_speech_encoder(config.conditioning.speech_encoder, device, progress)

    def encode(clip: Clip) -> Tensor:
        waveform = load_waveform(clip_path(dataset.root, clip.clip, "mp4"))
        return torch.cat([*encoder.encode_pieces(add_noise([waveform], level), clip.frames)]).cpu()

    return encode


def heard_openings(
    lips: LipPredictor, clips: list[Clip], speech: Callable[[Clip], Tensor]
) -> Callable[[str], np.ndarray]:
    """A function that returns the opening (F,), in eye distances, that the sound of a clip foretells, by its name."""
    by_name = {clip.clip: clip for clip in clips}

    def heard(name: str) -> np.ndarray:
        return lips.opening(speech(by_name[name]).to(lips.mean.device)).cpu().numpy()

    return heard


def raw_videos(clips: list[Clip], raw: Path | str | None) -> dict[str, Path]:
    """clip -> the video below `raw` that it was prepared from; empty without `raw`.

    Raises DheadsError if one is missing.
    """
    if raw is None:
        return {}
    sources = {clip.clip: Path(raw) / clip.source for clip in clips}
    for clip, path in sources.items():
        if not path.is_file():
            raise DheadsError(f"{path}: is missing, of which {clip} is made; give the folder that was prepared")
    return sources


def remake(
    engine: Engine,
    dataset: Dataset,
    clips: list[Clip],
    speech: Callable[[Clip], Tensor],
    folder: Path,
    seed: int,
    slots: int,
    progress: bool,
) -> list[tuple[str, str]]:
    """Write <folder>/<clip>.mp4 for every clip that has none yet, `slots` clips in lock-step.

    speech: returns the embeddings (F, D) of a clip. Returns (clip, reason) of the clips that cannot be read.
    Other clips in the batch change the pixels of a clip by no more than the device's rounding.
    Raises DheadsError if a video cannot be written.
    """
    todo = [clip for clip in clips if not _target(folder, clip).exists()]
    started: list[tuple[Clip, Stage]] = []
    failed: list[tuple[str, str]] = []

    def videos() -> Iterator[VideoSpec]:
        for clip in todo:
            try:
                stage = stage_of(dataset, clip, engine.config)
                video = VideoSpec(stage.photo, speech(clip), clip_seed(seed, clip), middle=stage.middle)
            except DheadsError as error:
                failed.append((clip.clip, str(error)))
                continue
            started.append((clip, stage))
            yield video

    unfinished: dict[int, list[np.ndarray]] = {}  # frames by index in `started`
    total = sum(clip.frames for clip in todo)
    log.info(
        "make %d videos %s: %d x %d px, %d frames, denoising steps a frame: %d; %d are there already",
        len(todo), described(engine.device), dataset.size, dataset.size, total, engine.sampling.steps,
        len(clips) - len(todo),
    )  # fmt: skip
    with tqdm(total=total, desc="sample", unit="frame", disable=not progress or not todo) as bar:
        made = in_lockstep(engine, videos(), max(1, min(slots, len(todo))))
        for index, frame, last in composed(made, lambda index, frame: started[index][1].finish(frame)):
            unfinished.setdefault(index, []).append(frame)
            bar.update()
            if last:
                _write(folder, dataset, started[index][0], unfinished.pop(index))
    return failed


def stage_of(dataset: Dataset, clip: Clip, config: Config) -> Stage:
    """How a clip's first picture is given to the network, for a video as large as the clip."""
    if not config.extensions.warp.flow:
        return Stage(dataset.photo(clip, config), None, lambda frame: frame, (dataset.size, dataset.size))
    picture, landmarks = dataset.pictures(clip, [0])[0], dataset.labels(clip)["landmarks"][:1].numpy()
    matrix = align_transforms(landmarks, dataset.alignment, config.network.image_size)[0]
    return staged(config, Portrait(picture, landmarks[0], matrix), dataset.size)


def clip_seed(seed: int, clip: Clip) -> int:
    """The seed of one clip's video: with one seed for all, all heads would move alike."""
    return seed + zlib.crc32(clip.clip.encode())


def _write(folder: Path, dataset: Dataset, clip: Clip, frames: list[np.ndarray]) -> None:
    target = _target(folder, clip)
    _make_folder(target.parent)
    # The sound is copied, as encoding it again would change the measures of generated and real sound differently.
    write_video(target, frames, clip_path(dataset.root, clip.clip, "mp4"), audio_codec="copy")


def _target(folder: Path, clip: Clip) -> Path:
    return folder / f"{clip.clip}.mp4"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DheadsError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error


def claim(folder: Path, settings: Facts) -> None:
    """Record in <folder>/settings.json how the videos of the folder are generated.

    Raises DheadsError for a folder with videos of other settings, as measures of both together would describe neither.
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
