"""One clip in a worker process: extracted from its raw files and written, or the reason why it cannot be used."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import av
import cv2
import numpy as np
import torch
from safetensors.torch import save

from dheads.config import Config
from dheads.dataset.extraction import Detector, Extract
from dheads.dataset.importer import Importer
from dheads.dataset.manifest import clip_path
from dheads.dataset.released_layout import RELEASED
from dheads.dataset.sources import Source
from dheads.errors import DheadsError
from dheads.faces.eyelids import without_gaps
from dheads.media.photos import silence_pillow
from dheads.media.writing import write_clip
from dheads.speech.sync import Sync
from dheads.system.files import complete_or_absent

_SYNC = "sync"  # in the metadata of a clip's labels
# Errors of a write that are not the clip's fault, and would recur at the next clip.
_OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class Finished(NamedTuple):
    """A clip that is written."""

    frames: int
    sync: Sync | None


Extractor: TypeAlias = Callable[[Path, Source], Extract]  # from the raw folder and a source in it


def start_worker(
    raw: Path, out: Path, config: Config, layout: str, devices: list[str], progress: bool, number: int
) -> Callable[[Source], Finished | str]:
    """`prepare_clip` for one worker process, with its networks on the device of its number."""
    # Every process prepares one clip alone; more threads would compete for the same cores.
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    silence_pillow()
    device = devices[number % len(devices)]
    extract = Importer(config) if layout == RELEASED else Detector(config, device, progress)
    return partial(prepare_clip, extract, raw, out)


def prepare_clip(extract: Extractor, raw: Path, out: Path, source: Source) -> Finished | str:
    """Write one clip; returns what it is, or the reason why the file cannot be used.

    Raises DheadsError where the clip cannot be written for a reason that would stop all others too.
    """
    extracted = None
    try:
        extracted = extract(raw, source)
        _write(extracted, out, source.clip)
        return Finished(len(extracted), extracted.sync)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        # A GPU that failed once fails from then on: this process ends, and another one tries the clip again.
        raise
    except Exception as error:  # whatever a library raises for a damaged file: one must not end the run
        if extracted is not None and (cause := _output_error(error)):
            raise DheadsError(f"cannot write to {out}: {cause}; mend that and run the command again") from error
        return _reason(error, raw, source)


def _write(extracted: Extract, out: Path, clip: str) -> None:
    video, labels = clip_path(out, clip, "mp4"), clip_path(out, clip, "safetensors")
    labels.parent.mkdir(parents=True, exist_ok=True)
    openness: list[float] = []

    def frames() -> Iterator[np.ndarray]:
        for frame, eyes in extracted.frames:
            openness.append(eyes)
            yield frame

    write_clip(video, frames(), extracted.waveform)
    eyes = torch.from_numpy(without_gaps(np.array(openness)))
    # The labels come last: where they are present, the clip is finished.
    try:
        with complete_or_absent(labels) as part:
            part.write_bytes(save({**extracted.labels, "eyes": eyes}, _metadata(extracted.sync)))
    except OSError:
        video.unlink()
        raise


def _metadata(sync: Sync | None) -> dict[str, str] | None:
    return None if sync is None else {_SYNC: json.dumps(sync)}


def finished(out: Path, clip: str) -> Finished | None:
    """A finished clip, which is one with labels; None for any other."""
    try:
        with clip_path(out, clip, "safetensors").open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        frames, stored = int(header["speech"]["shape"][0]), header.get("__metadata__", {}).get(_SYNC)
        sync = None if stored is None else Sync(*map(float, json.loads(stored)))
        return Finished(frames, sync) if clip_path(out, clip, "mp4").exists() else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError):
        return None  # absent or damaged


def _output_error(error: BaseException | None) -> str | None:
    """The system's message where the error, or one that caused it, means that nothing can be written any more."""
    while error is not None:
        number = getattr(error, "errno", None)
        if number in _OUTPUT_ERRORS:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def _reason(error: Exception, raw: Path, source: Source) -> str:
    """One line about what is wrong with a source, without the location of the raw folder."""
    explained = isinstance(error, DheadsError | cv2.error)
    text = " ".join((str(error) if explained else f"{type(error).__name__}: {error}").split())
    names = {source.sound: "its sound", source.landmarks: "its landmarks", source.embeddings: "its embeddings"}
    for path, name in {source.name: "it", **names}.items():
        if path is not None:
            text = text.replace(str(raw / path), name)
    # Any other error is neither damage that a library reports nor the machine's fault: it may be a bug of ours.
    known = explained or isinstance(error, OSError | av.FFmpegError | MemoryError)
    return text[:500] if known else f"{text[:450]} (unexpected; please report it)"
