"""Pack a prepared dataset into a few small files for transfer to another machine, and unpack it there.

    python recipes/pack_data.py pack data packed
    python recipes/pack_data.py unpack packed data

A part is a zip archive, such as packed/data-1-of-3.zip. Every part holds the dataset's tables, and for some clips:
clips/<speaker>/<clip>.mp4           H.264 with motion compensation, and Opus sound
clips/<speaker>/<clip>.safetensors   labels as 16-bit numbers: floats as fp16, as `_packed` stores them

Speech embeddings are large and packed only on demand, exactly; `unpack` encodes the others again from the Opus sound.
"""

from __future__ import annotations

import io
import os
import re
import struct
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import av
import numpy as np
import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from dheads.config import from_dict
from dheads.dataset.dataset import Dataset
from dheads.dataset.manifest import Clip, clip_path
from dheads.errors import DheadsError
from dheads.media.containers import decoded, name_of, opened
from dheads.media.sound import SAMPLES_PER_FRAME, waveform_pieces
from dheads.media.writing import write_clip
from dheads.speech.encoders import load_speech_encoder
from dheads.speech.interface import SpeechEncoder
from dheads.system.devices import resolve_device
from dheads.system.files import complete_or_absent_folder
from dheads.system.workers import cores

# The labels as `dheads prepare` stores them. Frames are the first axis; in speech_at_tempos the second.
_LABELS = {
    "speech": torch.float16,
    "speech_at_tempos": torch.float16,
    "landmarks": torch.float32,
    "mouth_box": torch.int32,
    "lips": torch.float32,
    "eyes": torch.float32,
}
_VOICES: dict[str, set[str]] = {"none": set(), "own": {"speech"}, "all": {"speech", "speech_at_tempos"}}
# One thread a clip; one key frame a clip. PSNR includes chroma, to which x264 gives fewer bits by default.
_PACKED = {"preset": "placebo", "tune": "psnr", "chromaoffset": "-4", "g": "500", "threads": "1"}
_UNPACKED = {"qp": "0", "g": "1", "threads": "1"}  # lossless
_PART = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})\.zip")
_TABLE = re.compile(r"dataset\.toml|clips(\.\d+-of-\d+)?\.csv")
# Limits against hostile parts that would fill the memory: bytes of an entry, and of a frame besides its pixels.
_MAX_BYTES, _MAX_FRAME_BYTES = 2**28, 2**15
# Raised by zipfile for damaged archives.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError, OverflowError)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def pack(
    data: Annotated[Path, typer.Argument(help="Dataset made by `dheads prepare`.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    part_mb: Annotated[float, typer.Option(min=0.001, help="Every part is smaller than this, MB.")] = 24.0,
    crf: Annotated[int, typer.Option(min=1, max=40, help="Of the pictures: larger is smaller and worse.")] = 14,
    sound_kbps: Annotated[int, typer.Option(min=8, max=128, help="Bit rate of the sound, kbit/s.")] = 32,
    voices: Annotated[
        Literal["none", "own", "all"],
        typer.Option(help="Speech embeddings to pack: none, those of the clips' own voices, or of all tempos."),
    ] = "none",
) -> None:
    """Pack a prepared dataset into parts."""
    dataset = Dataset(data)
    if not dataset.clips:
        raise DheadsError(f"{data}: holds no clip; prepare some first")
    with _complete_folder(out) as folder, tempfile.TemporaryDirectory() as scratch:

        def packed(clip: Clip) -> dict[str, bytes]:
            labels = {name: dataset.labels(clip)[name] for name in _LABELS}
            for name in _VOICES["all"] - _VOICES[voices]:
                labels[name] = labels[name].narrow(_time(name), 0, 0)
            source, path = clip_path(data, clip.clip, "mp4"), Path(scratch) / f"{threading.get_ident()}.mp4"
            pictures = _pictures(source, clip, dataset.info["size"])
            # At the same rate factor photos lose more.
            coding = _PACKED | {"crf": str(max(1, crf - 2) if clip.frames == 1 else crf)}
            write_clip(path, pictures, _sound(source, clip), x264_options=coding, opus_kbps=sound_kbps)
            stored = save({name: _packed(name, label) for name, label in labels.items()})
            return {_entry(clip, "mp4"): path.read_bytes(), _entry(clip, "safetensors"): stored}

        tables = {path.name: path.read_bytes() for path in sorted(data.iterdir()) if _TABLE.fullmatch(path.name)}
        with closing(_each(packed, dataset.clips, "pack")) as clips:
            _write_parts(folder, tables, clips, int(part_mb * 1e6))
    for path in sorted(out.iterdir()):
        typer.echo(path)


@app.command()
def unpack(
    parts: Annotated[list[Path], typer.Argument(help="The folder of the parts, or all parts.")],
    data: Annotated[Path, typer.Argument(help="Dataset to write.")],
    device: Annotated[str, typer.Option(help="Device that encodes speech: auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Unpack parts into a prepared dataset."""
    chosen = resolve_device(device)
    with ExitStack() as stack:
        archives = [stack.enter_context(_open(path)) for path in _all_parts(parts)]
        folder = stack.enter_context(_complete_folder(data))
        for name, content in _tables(archives).items():
            (folder / name).write_bytes(content)
        with _reading(archives[0], "its table", folder):
            dataset = Dataset(folder)
            preparation = from_dict({"preparation": dataset.info.get("preparation", {})}).preparation
        unpacker = Unpacker(dataset, _parts_by_entry(archives, dataset.clips), preparation.speech_tempos, chosen)
        with closing(_each(unpacker, dataset.clips, "unpack")) as done:
            for _ in done:
                pass
    typer.echo(data)


def _each(work: Callable[[Clip], Any], clips: list[Clip], name: str) -> Iterator[Any]:
    """Yield the result of `work` for each clip, in order, from a thread for each core; PyAV and torch free the GIL."""
    pool = ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from tqdm(pool.map(work, clips), total=len(clips), desc=name, unit="clip")
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _complete_folder(target: Path) -> Iterator[Path]:
    """A new folder next to `target`, which is renamed to it if the block succeeds, and deleted if not."""
    if target.exists():
        raise DheadsError(f"{target} exists already; delete it or choose another name")
    try:
        with complete_or_absent_folder(target) as part:
            yield part
    except OSError as error:
        raise DheadsError(f"cannot write {target}: {error.strerror}") from error


# --- Clips -----------------------------------------------------------------------------------------------------------


class Unpacker:
    """Adds clips to a dataset that has only its tables."""

    def __init__(
        self, dataset: Dataset, parts: dict[str, zipfile.ZipFile], tempos: tuple[float, ...], device: torch.device
    ) -> None:
        """parts: the part that holds each entry. tempos: of the voices besides a clip's own."""
        self._dataset, self._parts, self._tempos, self._device = dataset, parts, tempos, device
        self._size = dataset.info["size"]
        self._encoder: SpeechEncoder | None = None
        self._lock = threading.Lock()

    def __call__(self, clip: Clip) -> None:
        """Unpack one clip. Raises DheadsError where it is damaged, or cannot be written."""
        part, root = self._parts[_entry(clip, "safetensors")], self._dataset.root
        video = io.BytesIO(self._read(clip, "mp4"))
        stored = self._read(clip, "safetensors")
        with _reading(part, clip.clip, root):
            sound, packed = _sound(video, clip), load(stored)
            labels = {name: _unpacked(name, packed[name]).to(kind) for name, kind in _LABELS.items()}
            if len(labels["speech_at_tempos"]) not in (0, len(self._tempos)):
                raise ValueError("it has other tempos than its table")
        path = clip_path(root, clip.clip, "safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save(self._voiced(labels, sound, clip.frames)))
        with _reading(part, clip.clip, root):
            self._dataset.labels(clip)  # checks the shapes
        write_clip(clip_path(root, clip.clip, "mp4"), self._pictures(video, clip), sound, x264_options=_UNPACKED)

    def _read(self, clip: Clip, kind: str) -> bytes:
        most = min(_MAX_BYTES, (clip.frames + 1) * (3 * self._size**2 + _MAX_FRAME_BYTES))
        return _read(self._parts[_entry(clip, kind)], _entry(clip, kind), most)

    def _pictures(self, video: BinaryIO, clip: Clip) -> Iterator[av.VideoFrame]:
        with _reading(self._parts[_entry(clip, "mp4")], clip.clip, self._dataset.root):
            yield from _pictures(video, clip, self._size)

    def _voiced(self, labels: dict[str, Tensor], sound: Tensor, frames: int) -> dict[str, Tensor]:
        """The labels with the voices that were not packed, and without tempos where the clip had none."""
        speech, tempos = labels["speech"], labels.pop("speech_at_tempos")
        if not len(speech):
            speech = self._loaded_encoder().encode(sound, frames).half().cpu()
        if len(tempos) and not tempos.shape[1]:
            voices = [self._loaded_encoder().encode_at(tempo, sound, frames) for tempo in self._tempos]
            tempos = torch.stack(voices).half().cpu()
        return labels | {"speech": speech} | ({"speech_at_tempos": tempos} if len(tempos) else {})

    def _loaded_encoder(self) -> SpeechEncoder:
        with self._lock:
            if self._encoder is None:
                self._encoder = load_speech_encoder(str(self._dataset.info.get("speech_encoder")), self._device)
            return self._encoder


def _entry(clip: Clip, kind: str) -> str:
    """The name of a clip's file in its part."""
    return clip_path(Path(), clip.clip, kind).as_posix()


def _pictures(source: Path | BinaryIO, clip: Clip, size: int) -> Iterator[av.VideoFrame]:
    """Yield the stored frames of a video. Raises DheadsError unless number and size are those of the clip's table."""
    name, count = name_of(source, "its video"), 0
    with opened(source, name) as container:
        stream = next((stream for stream in container.streams.video if stream.codec_context), None)
        if stream is None:
            raise DheadsError(f"{name} holds no video")
        stream.codec_context.thread_count = 1  # there is a thread for every core
        for frame in islice(decoded(container, stream), clip.frames + 1):
            if (frame.width, frame.height, frame.format.name) != (size, size, "yuv420p") or frame.is_corrupt:
                raise DheadsError(f"{name}: frame {count} is damaged, or not of {size} x {size} px")
            count += 1
            yield frame
    if count != clip.frames:
        raise DheadsError(f"{name} does not hold {clip.frames} frames")


def _sound(source: Path | BinaryIO, clip: Clip) -> Tensor:
    """The sound (N,), 16 kHz, up to the length of the pictures. Raises DheadsError where it is too short."""
    wanted, pieces = clip.frames * SAMPLES_PER_FRAME, [torch.empty(0)]
    for piece in waveform_pieces(source):
        pieces.append(piece)
        if sum(map(len, pieces)) >= wanted:
            break
    sound = torch.cat(pieces)[:wanted]
    if len(sound) <= wanted - SAMPLES_PER_FRAME:
        raise DheadsError(f"{name_of(source, 'its video')} holds {len(sound)} samples of sound instead of {wanted}")
    return sound


def _time(name: str) -> int:
    return 1 if name == "speech_at_tempos" else 0


def _packed(name: str, label: Tensor) -> Tensor:
    """A label (...) as (2, ...) uint8: the low bytes, then the high bytes, of its 16-bit differences between frames.

    Deflate makes these 10 to 60 % smaller. Boxes are integers; all other labels become fp16.
    """
    numbers = label.short() if name == "mouth_box" else label.half()
    steps = np.diff(numbers.numpy().view(np.uint16), axis=_time(name), prepend=np.uint16(0))
    return torch.from_numpy(np.stack([steps & 255, steps >> 8]).astype(np.uint8))


def _unpacked(name: str, stored: Tensor) -> Tensor:
    """The exact inverse of `_packed`. Raises ValueError for a tensor that is no result of it."""
    if stored.dtype != torch.uint8 or stored.ndim < _time(name) + 2 or len(stored) != 2:
        raise ValueError(f"{name} is not stored as pairs of bytes")
    low, high = stored.numpy().astype(np.uint16)
    numbers = np.cumsum(low | high << 8, axis=_time(name), dtype=np.uint16)
    return torch.from_numpy(numbers.view(np.int16 if name == "mouth_box" else np.float16))


# --- Parts -----------------------------------------------------------------------------------------------------------


def _write_parts(folder: Path, tables: dict[str, bytes], clips: Iterable[dict[str, bytes]], limit: int) -> None:
    """Write the clips' entries into parts of less than `limit` bytes, each with the tables."""
    archives: list[zipfile.ZipFile] = []
    with ExitStack() as stack:
        for entries in clips:
            if not archives or _size_with(archives[-1], entries) >= limit:
                path = folder / f"{len(archives) + 1}.zip"
                archives.append(stack.enter_context(zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9)))
                _add(archives[-1], tables)
                if _size_with(archives[-1], entries) >= limit:
                    raise DheadsError(f"{next(iter(entries))} does not fit into a part; give a larger --part-mb")
            _add(archives[-1], entries)
    for number, archive in enumerate(archives, 1):
        Path(archive.filename).rename(folder / f"data-{number}-of-{len(archives)}.zip")


def _add(archive: zipfile.ZipFile, entries: dict[str, bytes]) -> None:
    for name, content in entries.items():
        info = zipfile.ZipInfo(name)  # without the time, so that the same data gives the same parts
        info.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(info, content)


def _size_with(archive: zipfile.ZipFile, entries: dict[str, bytes]) -> int:
    """An upper bound of the archive's bytes with further entries."""
    sizes = {info.filename: info.compress_size for info in archive.infolist()}
    sizes |= {name: len(content) + len(content) // 1000 + 64 for name, content in entries.items()}
    return 22 + sum(76 + 2 * len(name.encode()) + size for name, size in sizes.items())  # sizes of the zip format


def _all_parts(given: list[Path]) -> list[Path]:
    """The given parts, and those in given folders. Raises DheadsError unless they are all parts of one dataset."""
    parts = [part for path in given for part in (sorted(path.iterdir()) if path.is_dir() else [path])]
    numbers: dict[tuple[str, int], set[int]] = {}
    for path in list(parts):
        if match := _PART.fullmatch(path.name):
            numbers.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
        elif path in given:
            raise DheadsError(f"{path}: is not named as a part is, such as data-1-of-3.zip; give the parts alone")
        else:
            parts.remove(path)
    if len(numbers) != 1:
        found = ", ".join(f"{name} (of {count})" for name, count in sorted(numbers)) or "none"
        raise DheadsError(f"{given[0]}: parts of one dataset are wanted, found are: {found}; give one folder of parts")
    (name, count), there = next(iter(numbers.items()))
    missing = [number for number in range(1, count + 1) if number not in there]
    if missing:
        named = ", ".join(f"{name}-{number}-of-{count}.zip" for number in missing[:16]) + (", ..." * bool(missing[16:]))
        raise DheadsError(f"{given[0]}: parts are missing: {named}; copy them there too")
    return parts


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except _ZIP_ERRORS as error:
        raise DheadsError(f"{path}: is no whole part ({error}); copy it again") from error


def _tables(archives: list[zipfile.ZipFile]) -> dict[str, bytes]:
    """The tables, by name. Raises DheadsError where those of the parts differ."""
    every = [
        {name: _read(archive, name, _MAX_BYTES) for name in archive.namelist() if _TABLE.fullmatch(name)}
        for archive in archives
    ]
    for archive, tables in zip(archives, every, strict=True):
        if tables != every[0]:
            raise _damaged(archive, f"it is of another dataset than {archives[0].filename}")
    return every[0]


def _parts_by_entry(archives: list[zipfile.ZipFile], clips: list[Clip]) -> dict[str, zipfile.ZipFile]:
    """The part that holds each entry. Raises DheadsError unless each file of the clips is there exactly once."""
    wanted = {_entry(clip, kind) for clip in clips for kind in ("mp4", "safetensors")}
    parts: dict[str, zipfile.ZipFile] = {}
    for archive in archives:
        for name in archive.namelist():
            if _TABLE.fullmatch(name):
                continue
            if name not in wanted or name in parts:
                raise _damaged(archive, f"{name!r} is no file of a clip in its table, or there twice")
            parts[name] = archive
    if lacking := sorted(wanted - set(parts)):
        raise _damaged(archives[0], f"neither it nor the other parts hold {lacking[0]}")
    return parts


def _read(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """An entry's content. Raises DheadsError for one that is damaged or larger than `most` bytes."""
    info = archive.getinfo(name)
    if info.file_size > most or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _damaged(archive, f"{name} is far too large, or packed in another way")
    try:
        with archive.open(info) as file:
            return file.read(info.file_size)
    except _ZIP_ERRORS as error:
        raise _damaged(archive, f"{name} cannot be read ({error})") from error


@contextmanager
def _reading(part: zipfile.ZipFile, what: str, folder: Path) -> Iterator[None]:
    """A block whose errors are raised as damage of the part. what: what it reads; folder: it is unpacked to."""
    try:
        yield
    except (DheadsError, SafetensorError, LookupError, TypeError, ValueError) as error:
        reason = str(error).replace(f"{folder}{os.sep}", "").partition(";")[0]  # without the advice to the user
        raise _damaged(part, f"{what} cannot be read: {reason}") from error


def _damaged(part: zipfile.ZipFile, what: str) -> DheadsError:
    return DheadsError(f"{part.filename}: {what}; copy the part again, or pack the data again")


if __name__ == "__main__":
    try:
        app()
    except DheadsError as error:
        sys.exit(f"error: {error}")
