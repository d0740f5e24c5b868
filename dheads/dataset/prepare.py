"""`dheads prepare`: raw videos and photos to a dataset that `dheads train` reads."""

from __future__ import annotations

import errno
import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load, save
from tqdm import tqdm

from dheads.config import FPS, Config, preset, toml_text
from dheads.dataset.dataset import dataset_info
from dheads.dataset.extraction import Detector, Extract, Importer
from dheads.dataset.layouts import NAMESAKE, Source, find_sources
from dheads.dataset.manifest import Clip, FailedTable, Shard, clip_path, shard_path, standing_splits, write_clips
from dheads.errors import DheadsError
from dheads.media.photos import silence_pillow
from dheads.media.reading import frame_at
from dheads.media.writing import write_clip
from dheads.system.distributed import World, world
from dheads.system.files import PART, complete_or_absent
from dheads.system.workers import Died, cores, run

_IMPORTED = "released"  # the layout whose faces are aligned and whose sound is encoded already
# By landmark detector, a GPU: FAN keeps it busy; beside the mesh, on the CPU, the speech encoder hardly does, but every
# process takes half a gigabyte of it.
_WORKERS_A_GPU = {"fan": 4, "mesh": 16}
_DIED = "its worker process died (a crash of the decoder, or out of memory)"
# A write that fails so is not the clip's fault, and the next clip's would fail too.
_OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_SHEET_CLIPS, _SHEET_COLUMNS, _TILE_PX, _CAPTION_PX = 64, 8, 128, 12


@dataclass(frozen=True)
class Summary:
    """What is prepared now, by this run and those before it."""

    clips: int
    frames: int
    seconds: float
    speakers: int
    layout: str
    path: Path
    contact_sheet: Path | None  # None where there is no clip
    failed: list[tuple[str, str]] = field(default_factory=list)  # (source, reason)
    drops: dict[str, int] = field(default_factory=dict)  # kind of reason -> number of sources, the most first
    passed_over: dict[str, int] = field(default_factory=dict)  # kind of other files, such as .txt -> their number


def prepare(
    raw: Path | str,
    out: Path | str,
    config: Config,
    *,
    layout: str | None = None,
    split_file: Path | str | None = None,
    shard: Shard | None = None,
    workers: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Summary:
    """Prepare the videos and photos below `raw` into `out`, in the format of dheads.data.

    What is there already is kept, so that a run that was killed goes on where it stopped. A file that cannot be used is
    listed in failed.csv with its reason, and not tried again while it stands there.

    layout, split_file: as `layouts.find_sources` takes them. shard: (3, 16) prepares the third of 16 parts; under
    torchrun each process its own. workers: processes; 0: one a core, and not too many a GPU.

    Raises DheadsError when nothing can be prepared at all, and when `out` cannot be written.
    """
    here, raw, out = world(), Path(raw), Path(out)
    layout, sources, namesakes, passed_over = find_sources(raw, layout, split_file, standing_splits(out))
    shard = here.own_shard(shard)
    if shard is not None:
        own = slice(shard[0] - 1, None, shard[1])
        sources, namesakes = sources[own], dict(list(namesakes.items())[own])
    _check_import(layout, config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_info(out, config, layout)
    except OSError as error:
        raise DheadsError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    failed = FailedTable(out, shard, (source.name for source in sources))
    # What was left out for another of its name may be alone by now.
    failed.reasons = {name: why for name, why in failed.reasons.items() if not why.startswith(NAMESAKE)} | namesakes
    frames = {source.clip: count for source in sources if (count := _finished_frames(out, source.clip))}
    todo = [source for source in sources if source.clip not in frames and source.name not in failed.reasons]
    _sweep(out, todo)

    devices = _devices(device, here)
    start = partial(_start, raw, out, config, layout, devices, progress)
    results = run(start, todo, workers or _worker_count(config, devices, here))
    total, name = len(sources), f"prepare ({layout})"
    bar = tqdm(total=total, initial=total - len(todo), desc=name, unit="clip", disable=not progress)
    with bar, closing(results):
        for source, result in results:
            if isinstance(result, int):
                frames[source.clip] = result
            else:
                failed.add(source.name, _DIED if result is Died else result)
            bar.update()

    failed.finish()
    if not frames and shard is None:
        raise DheadsError(f"{raw}: none of its {total} files could be prepared; {failed.path} says why")
    clips = [Clip(s.clip, s.speaker, s.split, frames[s.clip], s.name) for s in sources if s.clip in frames]
    write_clips(out, clips, shard)
    kinds = Counter(_kind(reason) for _, reason in sorted(failed.reasons.items()))
    return Summary(
        clips=len(clips),
        frames=sum(frames.values()),
        seconds=sum(frames.values()) / FPS,
        speakers=len({clip.speaker for clip in clips}),
        layout=layout,
        path=out,
        contact_sheet=_contact_sheet(out, clips, shard_path(out, "contact-sheet.png", shard)) if clips else None,
        failed=sorted(failed.reasons.items()),
        drops=dict(kinds.most_common()),
        passed_over=passed_over,
    )


# --- What is to be done, and by whom ---------------------------------------------------------------------------------


def _files(out: Path, clip: str) -> tuple[Path, Path]:
    return clip_path(out, clip, "mp4"), clip_path(out, clip, "safetensors")


def _finished_frames(out: Path, clip: str) -> int | None:
    """The number of frames of a finished clip; its labels get their name last, so they tell."""
    picture, labels = _files(out, clip)
    try:
        with labels.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return int(header["speech"]["shape"][0]) if picture.exists() else None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError):  # absent or damaged
        return None


def _sweep(out: Path, todo: list[Source]) -> None:
    """Delete what killed workers left half-written. Other shards may be writing their own clips beside."""
    ours = {source.clip for source in todo}
    for folder in {clip.rpartition("/")[0] for clip in ours}:
        for path in (out / "clips" / folder).glob(".*.part"):
            match = PART.fullmatch(path.name)
            if match and f"{folder}/{match[1].rpartition('.')[0]}" in ours:
                path.unlink(missing_ok=True)


def _devices(device: str, here: World) -> list[str]:
    """What workers take turns at: under torchrun this process's own GPU, else all of them."""
    if device != "cuda":
        return [device]
    if here.size > 1:
        return [str(here.device(device))]
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def _worker_count(config: Config, devices: list[str], here: World) -> int:
    own = max(1, cores() // here.local_size)
    on_gpus = devices[0].startswith("cuda")
    return min(own, _WORKERS_A_GPU[config.alignment.landmarks] * len(devices)) if on_gpus else own


# --- One clip, in a worker process -----------------------------------------------------------------------------------


def _start(
    raw: Path, out: Path, config: Config, layout: str, devices: list[str], progress: bool, number: int
) -> Callable[[Source], int | str]:
    # Each process works alone on its clip; more threads would only fight for the same cores.
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    silence_pillow()
    device = devices[number % len(devices)]
    extract = Importer(config) if layout == _IMPORTED else Detector(config, device, progress)
    return partial(_attempt, extract, raw, out)


def _attempt(extract: Callable[[Path, Source], Extract], raw: Path, out: Path, source: Source) -> int | str:
    """Write one clip; returns its number of frames, or why the file cannot be used.

    Raises DheadsError where the clip cannot be written, which is not its fault.
    """
    made = None
    try:
        made = extract(raw, source)
        _write(made, out, source.clip)
        return len(made)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        # A GPU that failed once fails everything after: this process ends, and the clip is tried again by another.
        raise
    except Exception as error:  # whatever a library throws at a damaged file: one must not end the run
        if made is not None and (cause := _output_error(error)):
            raise DheadsError(f"cannot write to {out}: {cause}; mend that and run the command again") from error
        return _reason(error, raw, source)


def _write(made: Extract, out: Path, clip: str) -> None:
    picture, labels = _files(out, clip)
    labels.parent.mkdir(parents=True, exist_ok=True)
    with complete_or_absent(labels) as part:
        part.write_bytes(save(made.labels))
        write_clip(picture, made.frames, made.waveform)


def _output_error(error: BaseException | None) -> str | None:
    """What the system says where the error, or one that it came from, means that nothing can be written any more."""
    while error is not None:
        if getattr(error, "errno", None) in _OUTPUT_ERRORS:
            return os.strerror(error.errno)
        error = error.__cause__ or error.__context__
    return None


def _reason(error: Exception, raw: Path, source: Source) -> str:
    """One line that says what is wrong with a source, the same wherever the raw folder lies."""
    told = isinstance(error, DheadsError | cv2.error)
    text = " ".join((str(error) if told else f"{type(error).__name__}: {error}").split())
    words = {source.sound: "its sound", source.landmarks: "its landmarks", source.embeddings: "its embeddings"}
    for name, word in {source.name: "it", **words}.items():
        if name is not None:
            text = text.replace(str(raw / name), word)
    # What is neither damage that a library tells of nor the machine's fault may be ours.
    known = told or isinstance(error, OSError | av.FFmpegError | MemoryError)
    return text[:500] if known else f"{text[:450]} (unexpected; please report it)"


def _kind(reason: str) -> str:
    """Reasons that differ only in their numbers, or in their advice, are of one kind."""
    return re.sub(r"\d+(\.\d+)?", "N", reason.partition(";")[0])


# --- The folder ------------------------------------------------------------------------------------------------------


def _check_import(layout: str, config: Config) -> None:
    """Imported clips were aligned and encoded by the paper's authors, for which their presets stand.

    So dataset.toml names that alignment and that encoder, and training with any other refuses the clips; that it was
    the authors' own mean face they were aligned to is told by the layout.
    """
    theirs, told = preset("crema"), config.conditioning
    ours = (config.alignment, told.speech_encoder, told.speech_dim)
    if layout == _IMPORTED and ours != (
        theirs.alignment,
        theirs.conditioning.speech_encoder,
        theirs.conditioning.speech_dim,
    ):
        raise DheadsError(
            f"clips of the layout {layout!r} are aligned and encoded as the presets crema and lrw say; choose one of "
            "these with --preset"
        )


def _write_info(out: Path, config: Config, layout: str) -> None:
    """Write dataset.toml, or make sure that the one that is there says the same of how clips are made."""
    info = {**dataset_info(config), "layout": layout, "preparation": asdict(config.preparation)}
    info = json.loads(json.dumps(info))  # as the file gives it back: tuples are lists
    path = out / "dataset.toml"
    if path.exists():
        try:
            there = tomllib.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise DheadsError(f"{path}: cannot be read ({error}); choose another --out") from error
        for key, value in info.items():
            if there.get(key) != value:
                raise DheadsError(
                    f"{out}: holds clips prepared with {key} = {there.get(key)!r}, not {value!r}; choose another --out"
                )
        return
    note = "The licence of these clips is that of the recordings they were made from."
    info |= {"preset": config.name, "licence_note": note}
    with complete_or_absent(path) as part:  # other shards may be writing the same
        part.write_text(toml_text(info), encoding="utf-8")


def _contact_sheet(out: Path, clips: list[Clip], path: Path) -> Path:
    """Write the middle frames of up to 64 clips, evenly chosen, with their mouth boxes. Returns the path."""
    chosen = [clips[k] for k in np.unique(np.linspace(0, len(clips) - 1, _SHEET_CLIPS).round().astype(int))]
    width, height = _TILE_PX, _TILE_PX + _CAPTION_PX
    rows, columns = -(-len(chosen) // _SHEET_COLUMNS), min(len(chosen), _SHEET_COLUMNS)
    sheet = Image.new("RGB", (columns * width, rows * height))
    try:
        for k, clip in enumerate(chosen):
            row, column = divmod(k, _SHEET_COLUMNS)
            sheet.paste(_tile(*_files(out, clip.clip), clip, (width, height)), (column * width, row * height))
        with complete_or_absent(path) as part:
            sheet.save(part, "PNG")
    except (OSError, SafetensorError) as error:
        raise DheadsError(f"cannot make {path}: {error}; the clips themselves are complete") from error
    return path


def _tile(picture: Path, labels: Path, clip: Clip, size: tuple[int, int]) -> Image.Image:
    middle = clip.frames // 2
    frame = Image.fromarray(frame_at(picture, middle / FPS))
    x0, y0, x1, y1 = (load(labels.read_bytes())["mouth_box"][middle] * (_TILE_PX / frame.width)).tolist()
    tile = Image.new("RGB", size)
    tile.paste(frame.resize((_TILE_PX, _TILE_PX), Image.Resampling.LANCZOS))
    draw = ImageDraw.Draw(tile)
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline="lime")
    draw.text((2, _TILE_PX), clip.clip.rpartition("/")[2], "white", ImageFont.load_default(9))
    return tile
