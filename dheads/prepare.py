"""`dheads prepare`: raw videos and photos to a dataset that `dheads train` reads."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass, field
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from dheads.audio import SpeechEncoder, frame_count, load_speech_encoder, load_waveform
from dheads.config import FPS, SAMPLE_RATE, Config
from dheads.data import CLIP_COLUMNS, Clip, dataset_info
from dheads.errors import DheadsError
from dheads.faces import (
    align_transforms,
    apply_transform,
    fill_gaps,
    lip_thickness,
    mouth_box,
    mouth_opening,
    mouth_width,
    warp,
)
from dheads.landmarks import LandmarkBackend, find_face, load_backend
from dheads.photos import PHOTOS, load_photo
from dheads.video import VIDEOS, read_frames, write_clip

_MAX_GAP = 5  # frames without a face that are filled in from their neighbours
_MAX_SKEW_SECONDS = 0.25  # between the lengths of picture and sound
_SAMPLES_A_FRAME = SAMPLE_RATE // FPS


@dataclass(frozen=True)
class Source:
    """One raw file and where it belongs."""

    path: Path
    clip: str  # <speaker>/<name>
    speaker: str
    split: str


@dataclass(frozen=True)
class Summary:
    """What `prepare` did."""

    clips: int
    frames: int
    speakers: int
    failed: list[tuple[str, str]] = field(default_factory=list)  # (source, reason)


def prepare(
    raw: Path, out: Path, config: Config, *, split_file: Path | None = None, workers: int = 0, progress: bool = True
) -> Summary:
    """Prepare every video and photo below `raw` into `out`, in the format of dheads.data.

    Clips that are there already are kept, so that a broken-off run goes on where it stopped. A file that cannot be
    used is listed in failed.csv with its reason. `split_file`: a CSV with the columns clip, speaker and split (clip:
    the path below `raw`); without it the speaker is the first folder level and splits are by speaker. `workers` 0: one
    a core.

    Raises DheadsError when nothing can be prepared at all.
    """
    sources = find_sources(raw, split_file)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DheadsError(f"cannot make the folder {out}: {error.strerror}; choose another --out") from error
    _write_info(out, config)
    done, failed = [], []
    for source, result in _run(sources, raw, out, config, workers or os.cpu_count() or 1, progress):
        if isinstance(result, str):
            failed.append((source.path.relative_to(raw).as_posix(), result))
        else:
            name = source.path.relative_to(raw).as_posix()
            done.append(Clip(source.clip, source.speaker, source.split, result, name))
    _write_csv(out / "failed.csv", ("source", "reason"), sorted(failed))
    if not done:
        raise DheadsError(f"{raw}: none of its {len(sources)} files could be prepared; {out / 'failed.csv'} says why")
    done.sort(key=lambda clip: clip.clip)
    _write_csv(out / "clips.csv", CLIP_COLUMNS, [astuple(clip) for clip in done])
    return Summary(len(done), sum(clip.frames for clip in done), len({clip.speaker for clip in done}), sorted(failed))


def find_sources(raw: Path, split_file: Path | None = None) -> list[Source]:
    """Every video and photo below `raw`, with speaker and split. Raises DheadsError when there is none."""
    if not raw.is_dir():
        raise DheadsError(f"{raw}: is no folder; give the folder that holds the raw videos")
    paths = sorted(path for path in raw.rglob("*") if path.suffix.lower() in VIDEOS | PHOTOS and path.is_file())
    if not paths:
        raise DheadsError(f"{raw}: holds no video or photo; known endings are {', '.join(sorted(VIDEOS | PHOTOS))}")
    names = [path.relative_to(raw).as_posix() for path in paths]
    if split_file is None:
        speakers = [name.split("/")[0] if "/" in name else Path(name).stem for name in names]
        splits = split_speakers(sorted(set(speakers)))
        rows = {name: (speaker, splits[speaker]) for name, speaker in zip(names, speakers, strict=True)}
    else:
        rows = _read_splits(split_file)
    sources: dict[str, Source] = {}
    for path, name in zip(paths, names, strict=True):
        if name not in rows:
            continue
        clip = f"{_safe(rows[name][0])}/{_safe(name.rpartition('.')[0])}"
        if clip in sources:
            raise DheadsError(f"{path}: would be the same clip, {clip}, as {sources[clip].path}; rename or remove one")
        sources[clip] = Source(path, clip, *rows[name])
    if not sources:
        raise DheadsError(f"{split_file}: names no file below {raw}; its clips are paths such as {names[0]}")
    return list(sources.values())


def split_speakers(speakers: list[str]) -> dict[str, str]:
    """Train, val and test by speaker, never by clip: a tenth each held out, in the order of the names' hashes."""
    ordered = sorted(speakers, key=lambda speaker: hashlib.sha256(speaker.encode()).hexdigest())
    tenth = max(1, len(speakers) // 10) if len(speakers) >= 3 else 0
    held = dict.fromkeys(ordered[:tenth], "val") | dict.fromkeys(ordered[tenth : 2 * tenth], "test")
    return {speaker: held.get(speaker, "train") for speaker in speakers}


def _read_splits(path: Path) -> dict[str, tuple[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark before the first column
            rows = {row["clip"]: (row["speaker"], row["split"]) for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DheadsError(f"{path}: cannot be read ({error}); it must be a CSV with clip, speaker, split") from error
    except KeyError as error:
        raise DheadsError(f"{path}: has no column {error}; it must be a CSV with clip, speaker, split") from error
    speaker_splits: dict[str, str] = {}
    for clip, (speaker, split) in rows.items():
        if split not in ("train", "val", "test"):
            raise DheadsError(f"{path}: {clip} is in split {split!r}; use train, val or test")
        if speaker_splits.setdefault(speaker, split) != split:
            raise DheadsError(f"{path}: speaker {speaker} is in {speaker_splits[speaker]} and in {split}; choose one")
    return rows


def _safe(name: str) -> str:
    """A name that is one harmless path component."""
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "_"


class Worker:
    """One process's detector and speech encoder."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.backend: LandmarkBackend = load_backend(config.alignment.landmarks)
        self.encoder: SpeechEncoder = load_speech_encoder(config.conditioning.speech_encoder)

    def prepare(self, source: Source, out: Path) -> int:
        """Write one clip, picture and labels; returns its number of frames. Raises DheadsError when it is unusable."""
        is_photo = source.path.suffix.lower() in PHOTOS
        landmarks, waveform = self._photo(source.path) if is_photo else self._video(source.path)
        size, alignment = self.config.model.image_size, self.config.alignment
        matrices = align_transforms(landmarks, alignment, size)
        aligned = np.stack([apply_transform(m, points) for m, points in zip(matrices, landmarks, strict=True)])
        raw_frames = iter([load_photo(source.path)]) if is_photo else islice(read_frames(source.path), len(landmarks))
        frames = (warp(frame, m, size) for frame, m in zip(raw_frames, matrices, strict=True))
        labels = {
            "speech": self.encoder.encode(waveform, len(landmarks)).half(),
            "landmarks": torch.from_numpy(aligned.astype(np.float32)),
            "mouth_box": torch.from_numpy(mouth_box(aligned, size)).int(),
            "lips": torch.from_numpy(lip_measures(aligned)),
        }
        _write_pair(out / "clips" / source.clip, frames, waveform, labels)
        return len(landmarks)

    def _photo(self, path: Path) -> tuple[np.ndarray, torch.Tensor]:
        face, _ = find_face(load_photo(path), self.backend, str(path))
        return face.landmarks[None], torch.zeros(_SAMPLES_A_FRAME)

    def _video(self, path: Path) -> tuple[np.ndarray, torch.Tensor]:
        """Landmarks (F, 68, 2) and the sound, F frames of each."""
        waveform = load_waveform(path)
        landmarks = fill_gaps(self.backend.track(read_frames(path)), _MAX_GAP)
        count = min(len(landmarks), frame_count(waveform))
        skew = abs(len(landmarks) - frame_count(waveform)) / FPS
        if skew > _MAX_SKEW_SECONDS:
            raise DheadsError(f"picture and sound differ in length by {skew:.2f} s")
        missing = int(np.isnan(landmarks[:count]).any(axis=(1, 2)).sum())
        if missing:
            raise DheadsError(f"no face in {missing} of {count} frames")
        return landmarks[:count], waveform[: count * _SAMPLES_A_FRAME]


def lip_measures(landmarks: np.ndarray) -> np.ndarray:
    """(F, 68, 2) -> (F, 3) float32: opening, width and thickness (dheads.lips.MEASURES), in eye distances."""
    measures = [mouth_opening(landmarks), mouth_width(landmarks), lip_thickness(landmarks)]
    return np.stack(measures, axis=-1).astype(np.float32)


_worker: Worker | None = None


def _start_worker(config: Config) -> None:
    # Each process works alone on its clip; more threads would only fight for the same cores.
    global _worker
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    _worker = Worker(config)


def _prepare_one(source: Source, out: Path) -> int | str:
    """The number of frames, or why the file cannot be used."""
    if _worker is None:
        raise RuntimeError("the worker process was not started")
    try:
        return _worker.prepare(source, out)
    except (DheadsError, cv2.error) as error:
        return str(error)


def _run(
    sources: list[Source], raw: Path, out: Path, config: Config, workers: int, progress: bool
) -> Iterator[tuple[Source, int | str]]:
    todo = []
    for source in sources:
        frames = _done_frames(out / "clips" / source.clip)
        if frames is None:
            todo.append(source)
        else:
            yield source, frames
    if not todo:
        return
    bar = tqdm(total=len(sources), initial=len(sources) - len(todo), desc="prepare", unit="clip", disable=not progress)
    # Spawned, not forked: the libraries below hold threads, which a fork would leave in pieces.
    context = multiprocessing.get_context("spawn")
    with bar, ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker, (config,)) as pool:
        futures: dict[Future[int | str], Source] = {pool.submit(_prepare_one, source, out): source for source in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _done_frames(stem: Path) -> int | None:
    """The number of frames of a finished clip; the labels are written last, so they tell."""
    labels = stem.parent / f"{stem.name}.safetensors"
    if not labels.exists():
        return None
    with labels.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["speech"]["shape"][0])


def _write_pair(
    stem: Path, frames: Iterable[np.ndarray], waveform: torch.Tensor, labels: dict[str, torch.Tensor]
) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_clip(stem.parent / f"{stem.name}.mp4", frames, waveform)
    target = stem.parent / f"{stem.name}.safetensors"
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    save_file(labels, part)
    part.replace(target)


def _write_info(out: Path, config: Config) -> None:
    info = dataset_info(config)
    alignment = info.pop("alignment")
    assert isinstance(alignment, dict)
    note = "The licence of these clips is that of the recordings they were made from."
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**info, "licence_note": note}.items()]
    lines += ["", "[alignment]", *(f"{key} = {json.dumps(value)}" for key, value in alignment.items())]
    text = "\n".join(lines) + "\n"
    path = out / "dataset.toml"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise DheadsError(f"{out}: holds clips prepared with another configuration; choose another output folder")
    path.write_text(text, encoding="utf-8")


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    part.replace(path)
