"""Videos that every browser plays: the check, and copies in such a form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np

from dheads.errors import DheadsError
from dheads.media.containers import opened
from dheads.media.reading import read_frames
from dheads.media.sound import load_waveform
from dheads.media.writing import write_clip

_SOUND = frozenset({"aac", "mp3", "flac", "opus"})


def plays_in_browsers(path: Path) -> bool:
    """Whether a file is an MP4 of 8-bit H.264, silent or with sound that browsers decode; False if it is no video."""
    try:
        with opened(path, str(path)) as container:
            if "mp4" not in container.format.name or not container.streams.video:
                return False
            picture = container.streams.video[0].codec_context
            sounds = [stream.codec_context for stream in container.streams.audio]
            return (
                picture is not None
                and picture.name == "h264"
                and picture.pix_fmt in ("yuv420p", "yuvj420p")
                and all(sound is not None and sound.codec.canonical_name in _SOUND for sound in sounds)
            )
    except (DheadsError, av.FFmpegError):
        return False


def write_playable(source: Path, target: Path, side: int) -> None:
    """Write a near-lossless copy with a longer side of at most `side` px, 25 fps and 16 kHz sound, without metadata.

    The copy's codecs and metadata do not depend on the source. Raises DheadsError for a video or sound that cannot be
    read.
    """
    write_clip(target, _fitted(read_frames(source), side), load_waveform(source))


def longer_side(path: Path) -> int:
    """The longer side of a video's picture, px. Raises DheadsError for a file that is no video."""
    height, width = next(read_frames(path)).shape[:2]
    return int(max(height, width))


def _fitted(frames: Iterator[np.ndarray], side: int) -> Iterator[np.ndarray]:
    """Frames (H, W, 3) uint8 reduced by area averages to at most `side` px, height and width even."""
    for frame in frames:
        factor = min(1.0, side / max(frame.shape[:2]))
        height, width = (max(2, round(length * factor) // 2 * 2) for length in frame.shape[:2])
        same = (height, width) == frame.shape[:2]
        yield frame if same else cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
