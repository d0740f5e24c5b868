"""Frames and sound into an MP4 or MOV file, or into a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Self

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
_BT709 = 1  # the number of BT.709 in H.264's tables of primaries, transfer and matrix
_CONTAINERS = {".mp4": "mp4", ".m4v": "ipod", ".mov": "mov"}  # FFmpeg's names, by the ending of a file
_FRAGMENTED = "frag_keyframe+delay_moov+default_base_moof"  # what is played before it is complete


class VideoWriter:
    """An MP4 or MOV that grows frame by frame: complete when it is closed, or absent. A stream, a pipe and a device get
    it in fragments.

    As a context manager it is closed where its block ends well, and discarded where it fails; so it is where `add` or
    `close` fails. Both raise DheadsError for what cannot be written, as does opening one. `notes`: what the user should
    know of the sound.
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
            place, movflags = stack.enter_context(_place(target))
            options = {"movflags": movflags}
            self._output = stack.enter_context(av.open(place, "w", format=container_of(target), options=options))
            self._output.metadata.update(tags | {"encoding_tool": _PROGRAM})
            self._video = self._output.add_stream("libx264", rate=fps, options=x264_options)
            self._video.pix_fmt = "yuv420p"
            self._video.color_primaries = self._video.color_trc = self._video.colorspace = _BT709
            self._video.color_range = ColorRange.MPEG
            self._scaler = VideoReformatter()  # one for all frames, as when reading
            self._sound = soundtrack.add(self._output)
            self._pending = next(self._sound, None)
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        else:
            self._open.__exit__(kind, error, trace)

    def add(self, image: np.ndarray | av.VideoFrame) -> None:
        """Encode the next (H, W, 3) uint8 RGB frame, or one decoded from such a video, whose YUV is encoded as it is;
        all are as large as the first."""
        with ExitStack() as failing:
            failing.push(self._open)
            frame = image if isinstance(image, av.VideoFrame) else _yuv(image, self._scaler)
            # The encoder chooses the key frames, not the one that the frame comes from.
            frame.pts, frame.time_base, frame.pict_type = self.count, Fraction(1, self._fps), PictureType.NONE
            if self.count == 0:
                self._video.height, self._video.width = frame.height, frame.width
                check_even(frame.height, frame.width)
            # Interleave: a stream's reader gets the sound with the picture, not after it.
            while self._pending and self._pending.dts * self._pending.time_base <= self.count / self._fps:
                self._mux_sound(self._pending)
                self._pending = next(self._sound, None)
            self._output.mux(self._video.encode(frame))
            self.count += 1
            failing.pop_all()

    def close(self) -> None:
        """Write what is left of the sound; a file takes its name."""
        with self._open:
            if self.count == 0:
                raise DheadsError(f"there is no frame to write to {name_of(self._target)}")
            self._output.mux(self._video.encode())
            for packet in chain([self._pending] if self._pending else [], self._sound):
                self._mux_sound(packet)

    def _mux_sound(self, packet: av.Packet) -> None:
        with suppress(av.InvalidDataError):  # a copied packet that is damaged
            self._output.mux(packet)

    def discard(self) -> None:
        """Leave nothing of a file."""
        with suppress(DheadsError, _Discarded), self:
            raise _Discarded


class _Discarded(Exception):
    pass


def video_writer(
    target: Path | str | BinaryIO,
    audio: Path | str | BinaryIO | None,
    *,
    audio_codec: AudioCodec = "aac",
    fps: int = FPS,
    comment: str | None = None,
) -> VideoWriter:
    """A writer of H.264 in an MP4 (or, by the name's ending, an M4V or MOV) that plays everywhere, beside the sound of
    `audio`.

    audio_codec: "aac" copies LC-AAC bit for bit and encodes other sound to it, "copy" copies all that MP4 can hold. The
    metadata say that the video is AI-generated and by what; `comment` takes the place of that sentence.
    Raises DheadsError for a target that cannot be written and for unreadable sound.
    """
    tags = {
        "title": "AI-generated talking-head video",
        "comment": comment or f"AI-generated talking-head video made by {_PROGRAM}",
    }
    target = as_path(target)
    sound = nullcontext(no_sound())
    if audio is not None:
        sound = source_sound(as_path(audio), audio_codec, container_of(target))
    # A stream's fragments end at key frames, and its reader is waiting for the first.
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
    """Encode (H, W, 3) uint8 RGB frames as they arrive, as `video_writer` does; returns how many there were.

    Raises DheadsError for a target that cannot be written and for unreadable sound, before a frame is asked for.
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
    """Write a prepared clip: 25 fps, every frame a near-lossless key frame, lossless 16 kHz sound (N,).

    frames: as `VideoWriter.add` takes them. x264_options: instead of near-lossless key frames. opus_kbps: the rate of
    Opus, instead of lossless sound.
    Returns the number of frames. Raises DheadsError for a path that cannot be written.
    """
    sound = nullcontext(waveform_sound(waveform, opus_kbps))
    options = {"crf": "6", "g": "1"} if x264_options is None else x264_options
    with VideoWriter(Path(path), sound, FPS, {"title": "Prepared clip"}, options) as writer:
        for image in frames:
            writer.add(image)
    return writer.count


def check_even(height: int, width: int) -> None:
    """Raises DheadsError for a size that H.264 with halved chroma cannot hold."""
    if height % 2 or width % 2:
        raise DheadsError(f"frames of {width} x {height} px cannot be written; make both even")


def _yuv(image: np.ndarray, scaler: VideoReformatter) -> av.VideoFrame:
    return scaler.reformat(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"),
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=SCALER,
    )


def container_of(target: Path | BinaryIO) -> str:
    """What a target becomes, by FFmpeg's name. Raises DheadsError for a file whose name asks for what is not made."""
    container = _CONTAINERS.get(target.suffix.lower()) if isinstance(target, Path) else None
    if container is None and not _is_stream(target):
        raise DheadsError(f"{target}: a video's name must end in .mp4, .m4v or .mov, as no other kind is made")
    return container or "mp4"


def _is_stream(target: Path | BinaryIO) -> bool:
    return not isinstance(target, Path) or is_endless(target)


@contextmanager
def _place(target: Path | BinaryIO) -> Iterator[tuple[str | BinaryIO | Stream, str]]:
    """What the muxer writes to, and its flags."""
    if not isinstance(target, Path):
        yield target, _FRAGMENTED
    elif is_endless(target):
        with stream_into(target) as stream:
            yield stream, _FRAGMENTED
    else:
        with complete_or_absent(target) as part:
            part.open("xb").close()  # the muxer would not try before the first frame
            yield str(part), "faststart"


@contextmanager
def _muxer_errors(target: Path | BinaryIO) -> Iterator[None]:
    """A name that cannot be written, a full disk and a closed pipe become a DheadsError."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        # PyAV passes on what a stream's write() raised, or hides it behind its own error.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise DheadsError(f"cannot write {name_of(target)}: {cause.strerror or cause}") from error
