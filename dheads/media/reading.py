"""Frames of any video or animated picture, at 25 fps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from dheads.config import FPS
from dheads.errors import DheadsError
from dheads.media.colours import ToRgb
from dheads.media.containers import decoded, opened, start_seconds
from dheads.media.photos import open_animation

# The endings, in lower case, of video files that FFmpeg reads.
VIDEOS = frozenset(
    {".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".mk3d", ".webm", ".ogv", ".ogm", ".nut"}
    | {".mpg", ".mpeg", ".mpe", ".vob", ".mod", ".tod", ".ts", ".mts", ".m2ts", ".m2t", ".dv", ".mxf"}
    | {".avi", ".divx", ".wmv", ".asf", ".wtv", ".flv", ".rm", ".rmvb"}
)
_MAX_HOLD_SECONDS = 600  # a picture that is on screen for longer has a damaged time stamp

_Render = Callable[[], np.ndarray]  # gives a picture (H, W, 3) uint8; only those that are shown are converted


def read_frames(path: Path | str, fps: int = FPS) -> Iterator[np.ndarray]:
    """Upright frames (H, W, 3) uint8 RGB of a video or an animated picture, one every 1/fps s whatever its own rate.

    Frame k is the picture on screen (k + 1/2)/fps seconds after the container's time 0, where sample 0 of
    `sound.load_waveform` is: it is at most half a frame early or late, and on average neither. A video of d seconds
    gives round(d fps) frames. Damaged packets are skipped. Pixels are square, and the colours those of SDR.
    Raises DheadsError for a missing or unreadable file and for one without pictures.
    """
    render: _Render | None = None  # of the picture on screen
    count, end = 0, 0.0
    for picture, begin, duration in _timed_pictures(Path(path)):
        if begin + duration - end > _MAX_HOLD_SECONDS:
            raise DheadsError(f"{path} jumps from {end:.0f} s to {begin + duration:.0f} s: its time stamps are damaged")
        # Times are often rounded to milliseconds: a picture that is due within one counts as shown.
        while render is not None and (count + 0.5) / fps < begin - 1e-3:
            yield render()
            count += 1
        render, end = picture, begin + duration
    if render is None:
        raise DheadsError(f"{path} holds no picture that can be decoded")
    for _ in range(max(round(end * fps) - count, 1 - count)):
        yield render()


def frame_at(path: Path | str, seconds: float = 0.0) -> np.ndarray:
    """The frame (H, W, 3) uint8 RGB of a video at that time. Raises DheadsError if the video is shorter."""
    number = int(seconds * FPS + 1e-6)  # 1e-6: k / FPS belongs to frame k even if it is rounded down
    frame = next(islice(read_frames(path), number, None), None)
    if frame is None:
        raise DheadsError(f"{path} is shorter than {seconds:g} s; ask for an earlier time")
    return frame


def _timed_pictures(path: Path) -> Iterator[tuple[_Render, float, float]]:
    """(render, begin in s, duration in s) of every picture of a file's first video stream."""
    if animation := open_animation(path):
        begin = 0.0
        for picture, duration in animation:
            yield partial(np.copy, picture), begin, duration
            begin += duration
        return
    with opened(path, str(path)) as container:
        stream = next((s for s in container.streams.video if s.codec_context), None)
        if stream is None:
            raise DheadsError(f"{path} holds no video stream that can be decoded; give a video")
        stream.thread_type = "AUTO"
        start = start_seconds(container)
        frame_seconds = float(1 / (stream.average_rate or FPS))
        begin = -frame_seconds
        to_rgb = ToRgb()
        for frame in decoded(container, stream):
            begin = begin + frame_seconds if frame.time is None else frame.time - start
            duration = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else frame_seconds
            yield partial(to_rgb, frame, stream.sample_aspect_ratio), begin, duration
