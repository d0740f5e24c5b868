"""The face that a video shows: found in a photo, in a video, or in a picture that is given as an array."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from dheads.config import FPS, Config
from dheads.errors import DheadsError
from dheads.faces.alignment import align_transforms, beyond_edge
from dheads.faces.detection import LandmarkBackend
from dheads.faces.landmarks import find_face, in_view
from dheads.media.containers import opened
from dheads.media.photos import NotAPhoto, load_photo
from dheads.media.reading import frame_at, read_frames

_SEARCHED_FRAMES = 10 * FPS  # of a video, for its first face
_MUCH_BEYOND = 0.1  # share of the frame that lies beyond the edge of the picture


@dataclass(frozen=True, eq=False)
class Portrait:
    """A picture and where the face in it is."""

    picture: np.ndarray  # (H, W, 3) uint8
    landmarks: np.ndarray  # (68, 2) px of it
    matrix: np.ndarray  # (2, 3) from the picture to the crop
    notes: list[str] = field(default_factory=list)


def find_portrait(
    face: Path | str | np.ndarray,
    config: Config,
    backend: LandmarkBackend,
    *,
    at: float | None = None,
    which: int | None = None,
) -> Portrait:
    """The face in a photo, in a video, or in a picture (H, W, 3) uint8 RGB.

    at: seconds into a video; by default its first frame with a face. which: of several faces, counted from the largest.
    Raises DheadsError if there is no such face.
    """
    notes: list[str] = []
    if isinstance(face, np.ndarray):
        picture, name = _checked(face), "the given picture"
    else:
        picture, name = _picture(Path(face), backend, at, notes)
    found, count = find_face(picture, backend, name, which or 1)
    if which is None and count > 1:
        notes.append(f"{name} shows {count} faces; taking the largest")
    matrix = align_transforms(found.landmarks[None], config.alignment, config.network.image_size)[0]
    return Portrait(picture, found.landmarks, matrix, notes)


def _checked(picture: np.ndarray) -> np.ndarray:
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise DheadsError(
            f"the given picture is an array of shape {picture.shape} and type {picture.dtype}; give (H, W, 3) uint8 RGB"
        )
    return picture


def _picture(path: Path, backend: LandmarkBackend, at: float | None, notes: list[str]) -> tuple[np.ndarray, str]:
    """The picture to look for a face in, and its name in messages."""
    try:
        photo = load_photo(path, notes)
    except NotAPhoto as no_photo:
        if at is not None:
            return frame_at(path, at), f"{path} at {at:g} s"
        first = None
        try:
            for frame in islice(read_frames(path), _SEARCHED_FRAMES):
                first = frame if first is None else first
                if any(in_view(face, frame.shape) for face in backend.glance(frame)):
                    return frame, str(path)
        except DheadsError:
            if _is_sound(path):
                raise DheadsError(f"{path} is sound without a picture; give FACE first, then AUDIO") from None
            raise no_photo from None
        if first is None:
            raise no_photo
        return first, str(path)
    if at is not None:
        raise DheadsError(f"{path} is a photo; a time is for a video")
    return photo, str(path)


def _is_sound(path: Path) -> bool:
    with suppress(DheadsError), opened(path, str(path)) as container:
        return bool(container.streams.audio) and not container.streams.video
    return False


def notes_on_edge(portrait: Portrait, size: int, name: str) -> list[str]:
    """What the user should know about a frame that reaches far beyond the picture's edge."""
    share = (beyond_edge(portrait.picture.shape, portrait.matrix, size) > 0).mean()
    if share < _MUCH_BEYOND:
        return []
    return [f"{name} ends close to the face, so {share:.0%} of the frame are blurred; --paste shows the photo as it is"]
