"""What is checked before a video is begun: its output, and sound from a pipe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from dheads.errors import DheadsError
from dheads.media.containers import name_of
from dheads.media.writing import check_even, container_of
from dheads.sampling.jobs import Job, check_inputs
from dheads.system.files import is_endless, target_of, unfinished_in

MAX_SPOOLED = 8 << 30  # bytes of sound from a pipe
_CHUNK = 1 << 20  # bytes read at a time


@contextmanager
def spooled(stream: BinaryIO) -> Iterator[BinaryIO]:
    """A stream's data as a temporary file, as sound is read twice; it never has a name that could be left behind."""
    name = name_of(stream)
    with TemporaryFile() as file:
        try:
            while part := stream.read(_CHUNK):
                file.write(part)
                if file.tell() > MAX_SPOOLED:
                    raise DheadsError(f"{name} gives more than {MAX_SPOOLED >> 30} GiB; give the sound as a file")
            file.flush()
        except OSError as error:
            raise DheadsError(f"cannot keep the sound from {name}: {error.strerror}; free some disk space") from error
        file.raw.name = name  # type: ignore[attr-defined]  # for messages
        yield file


def check(job: Job) -> None:
    """Raises DheadsError for what shows without reading anything, before any work is done."""
    check_inputs(job)
    if job.size is not None:
        check_even(job.size, job.size)
    if not isinstance(job.output, Path) or is_endless(job.output):
        return
    try:
        folder = target_of(job.output).parent
    except OSError as error:
        raise DheadsError(f"cannot write {job.output}: {error.strerror}") from error
    container_of(job.output)
    if not folder.is_dir():
        raise DheadsError(f"{job.output}: the folder {folder} does not exist; create it or choose another")
    if not os.access(folder, os.W_OK):
        raise DheadsError(f"{job.output}: the folder {folder} cannot be written to; choose another")
    for source in (job.face, job.audio, job.motion_from):
        with suppress(OSError):
            if isinstance(source, Path) and job.output.samefile(source):
                raise DheadsError(f"{job.output} is the input itself; give the video another name")


def sweep(jobs: list[Job]) -> None:
    """Delete the incomplete outputs that a killed run left."""
    targets = [Path(os.path.realpath(job.output_path)) for job in jobs]
    ours = {(target.parent, target.name[:200]) for target in targets}
    for folder in {folder for folder, _ in ours}:
        for path, name in unfinished_in(folder):
            if (folder, name) in ours:
                with suppress(OSError):
                    path.unlink()
