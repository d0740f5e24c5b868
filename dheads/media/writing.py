"""Frames and sound into an MP4, M4V or MOV file, or into a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import av
import numpy as np
import torch
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from dheads import __version__
from dheads.config import FPS, AudioCodec
from dheads.errors import DheadsError
from dheads.media.colours import SCALER
from dheads.media.containers import name_of
from dheads.media.soundtrack import Soundtrack, no_sound, source_sound, waveform_sound
from dheads.system.files import Stream, as_path, complete_or_absent, is_endless, stream_into

_PROGRAM = f"dheads {__version__}"
_BT709 = 1  # in H.264's tables of primaries, transfer and matrix
_CONTAINERS = {".mp4": "mp4", ".m4v": "ipod", ".mov": "mov"}  # FFmpeg's name by file name ending
_FRAGMENTED = "frag_keyframe+delay_moov+default_base_moof"  # movflags of a file that plays before it is complete


class VideoWriter:
    """Writes an MP4, M4V or MOV frame by frame. The file appears complete when the writer is closed, or not at all;
    streams, pipes and devices get a fragmented MP4.

    As a context manager it is closed if the block succeeds and discarded if the block fails. It is also discarded if
    `add` or `close` fails. These and the constructor raise DheadsError for a target that cannot be written. `notes` are
    sentences for the user about the sound.
    """

    def __init__(
        self,
        target: Path | BinaryIO,
        sound: AbstractContextManager[Soundtrack],
        fps: int,
        tags: dict[str, str],
        x264_options: dict[str, str],
    ) -> None:
        self.count = 0  # frames so far
        self._target, self._fps = target, fps
        with ExitStack() as stack:
            soundtrack = stack.enter_context(sound)
            self.notes = soundtrack.notes
            stack.enter_context(_muxer_errors(target))
            file, movflags = stack.enter_context(_destination(target))
            options = {"movflags": movflags}
            self._output = stack.enter_context(av.open(file, "w", format=container_of(target), options=options))
            self._output.metadata.update(tags | {"encoding_tool": _PROGRAM})
            self._video = self._output.add_stream("libx264", rate=fps, options=x264_options)
            self._video.pix_fmt = "yuv420p"
            self._video.color_primaries = self._video.color_trc = self._video.colorspace = _BT709
            self._video.color_range = ColorRange.MPEG
            self._scaler = VideoReformatter()  # one for all frames, as it takes long to set up
            self._sound = soundtrack.add(self._output)
            self._pending = next(self._sound, None)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._open.__exit__(kind, error, trace)

    def add(self, image: np.ndarray | av.VideoFrame) -> None:
        """Encode the next frame: (H, W, 3) uint8 RGB, or one decoded from such a video, whose YUV is encoded as it is.

        All frames have the size of the first. Raises DheadsError for an odd height or width.
        """
        with ExitStack() as failing:
            failing.push(self._open)
            frame = image if isinstance(image, av.VideoFrame) else _yuv(image, self._scaler)
            # The encoder chooses the key frames, not the source of a decoded frame.
            frame.pts, frame.time_base, frame.pict_type = self.count, Fraction(1, self._fps), PictureType.NONE
            if self.count == 0:
                self._video.height, self._video.width = frame.height, frame.width
                check_even(frame.height, frame.width)
            # Interleave: the reader of a stream gets the sound with the picture, not after it.
            while self._pending and _decode_seconds(self._pending) <= self.count / self._fps:
                self._mux_sound(self._pending)
                self._pending = next(self._sound, None)
            self._output.mux(self._video.encode(frame))
            self.count += 1
            failing.pop_all()

    def close(self) -> None:
        """Write the rest of the sound; a file then takes its name."""
        with self._open:
            if self.count == 0:
                raise DheadsError(f"there is no frame to write to {name_of(self._target)}")
            self._output.mux(self._video.encode())
            for packet in chain([self._pending] if self._pending else [], self._sound):
                self._mux_sound(packet)

    def _mux_sound(self, packet: av.Packet[av.AudioStream]) -> None:
        with suppress(av.InvalidDataError):  # a copied packet that is damaged
            self._output.mux(packet)

    def discard(self) -> None:
        """Stop writing and remove the unfinished file."""
        with suppress(DheadsError, _Discarded), self:
            raise _Discarded


class _Discarded(Exception):
    """Ends the writer's contexts as a failure does."""


def _decode_seconds(packet: av.Packet[av.AudioStream]) -> Fraction:
    assert packet.dts is not None  # encoders set it, and packets without it are not copied
    return packet.dts * packet.time_base


def video_writer(
    target: Path | str | BinaryIO,
    audio: Path | str | BinaryIO | None,
    *,
    audio_codec: AudioCodec = "aac",
    fps: int = FPS,
    comment: str | None = None,
) -> VideoWriter:
    """A writer of H.264 and the sound of `audio` into an MP4 (or, by the name's ending, an M4V or MOV).

    audio: None for a silent video. audio_codec: "aac" copies LC-AAC bit for bit and encodes other sound to it; "copy"
    copies every codec that the container can hold. comment: the metadata's comment, by default that the video is
    AI-generated and by which program. Raises DheadsError for a target that cannot be written and for unreadable sound.
    """
    tags = {
        "title": "AI-generated talking-head video",
        "comment": comment or f"AI-generated talking-head video made by {_PROGRAM}",
    }
    target = as_path(target)
    sound: AbstractContextManager[Soundtrack] = nullcontext(no_sound())
    if audio is not None:
        sound = source_sound(as_path(audio), audio_codec, container_of(target))
    # Fragments end at key frames, and the reader of a stream waits for the first.
    pace = {"g": "25", "tune": "zerolatency"} if _is_stream(target) else {"g": "50"}
    return VideoWriter(target, sound, fps, tags, {"crf": "16", "preset": "medium", **pace})


def write_video(
    target: Path | str | BinaryIO,
    frames: Iterable[np.ndarray],
    audio: Path | str | BinaryIO | None,
    *,
    audio_codec: AudioCodec = "aac",
    fps: int = FPS,
    comment: str | None = None,
) -> int:
    """Encode (H, W, 3) uint8 RGB frames as they arrive, with the options of `video_writer`; returns their number.

    Raises DheadsError for a target that cannot be written and for unreadable sound, before the first frame is taken.
    """
    with video_writer(target, audio, audio_codec=audio_codec, fps=fps, comment=comment) as writer:
        for image in frames:
            writer.add(image)
    return writer.count


def write_clip(
    path: Path | str,
    frames: Iterable[np.ndarray | av.VideoFrame],
    waveform: torch.Tensor,
    *,
    x264_options: dict[str, str] | None = None,
    opus_kbps: int | None = None,
) -> int:
    """Write a prepared clip: 25 fps, near-lossless key frames only, and a waveform (N,) at 16 kHz; returns the frames'
    number.

    frames: as for `VideoWriter.add`. x264_options: replace those of near-lossless key frames. opus_kbps: the bit rate
    of Opus; None for lossless sound. Raises DheadsError for a path that cannot be written.
    """
    sound = nullcontext(waveform_sound(waveform, opus_kbps))
    options = {"crf": "6", "g": "1"} if x264_options is None else x264_options
    with VideoWriter(Path(path), sound, FPS, {"title": "Prepared clip"}, options) as writer:
        for image in frames:
            writer.add(image)
    return writer.count


def check_even(height: int, width: int) -> None:
    """Raise DheadsError for an odd height or width (px), which H.264 with 4:2:0 chroma cannot hold."""
    if height % 2 or width % 2:
        raise DheadsError(f"frames of {width} x {height} px cannot be written; make both even")


def _yuv(image: np.ndarray, scaler: VideoReformatter) -> av.VideoFrame:
    """(H, W, 3) uint8 RGB -> yuv420p, BT.709, limited range."""
    return scaler.reformat(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"),
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=SCALER,
    )


def container_of(target: Path | BinaryIO) -> str:
    """FFmpeg's name of the container of a target. Raises DheadsError for a file name with another ending."""
    container = _CONTAINERS.get(target.suffix.lower()) if isinstance(target, Path) else None
    if container is None and not _is_stream(target):
        raise DheadsError(f"{target}: a video's name must end in .mp4, .m4v or .mov, as no other kind is made")
    return container or "mp4"


def _is_stream(target: Path | BinaryIO) -> bool:
    """Whether a target is read while it is written: a stream, a pipe or a device."""
    return not isinstance(target, Path) or is_endless(target)


@contextmanager
def _destination(target: Path | BinaryIO) -> Iterator[tuple[str | BinaryIO | Stream, str]]:
    """The file or stream for the muxer, and its movflags."""
    if not isinstance(target, Path):
        yield target, _FRAGMENTED
    elif is_endless(target):
        with stream_into(target) as stream:
            yield stream, _FRAGMENTED
    else:
        with complete_or_absent(target) as part:
            part.open("xb").close()  # fails now; the muxer opens it with the first frame only
            yield str(part), "faststart"


@contextmanager
def _muxer_errors(target: Path | BinaryIO) -> Iterator[None]:
    """Turn errors of writing (a bad name, a full disk, a closed pipe) into DheadsError."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        # PyAV raises the error of a stream's write() itself, or its own error with that as context.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise DheadsError(f"cannot write {name_of(target)}: {cause.strerror or cause}") from error
