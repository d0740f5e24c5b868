"""Frames out of any video at 25 fps, and frames into an MP4 with its sound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Self

import av
import numpy as np
import torch
from av.bitstream import BitStreamFilterContext
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from dheads import __version__
from dheads.config import FPS, SAMPLE_RATE
from dheads.errors import DheadsError
from dheads.files import part_of
from dheads.media import decoded, mono, name_of, opened, packets, start_seconds

VIDEOS = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".flv", ".mpg", ".mpeg", ".m4v"})  # file endings
# Sound that is copied as it is: MP4 holds these, and browsers or their systems play them.
COPIED_CODECS = frozenset({"aac", "mp3", "alac", "flac", "opus"})
_MIN_MP3_RATE = 16_000  # slower MP3 ("MPEG 2.5") is not in MP4's standard
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
_AAC_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}  # by number of channels
_PROGRAM = f"dheads {__version__}"
_MAX_HOLD_SECONDS = 600  # one picture on screen for longer is a damaged time stamp
_BT709 = 1  # the number of BT.709 in H.264's tables of primaries, transfer and matrix
# Without these, swscale takes the nearest chroma sample and rounds down.
SCALER = (
    Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND
)


_unfinished: set[Path] = set()  # half-written files of this process
# Adds a sound stream to an output and returns its packets.
AddSound = Callable[[av.container.OutputContainer], Iterator[av.Packet]]


# --- Pixels ----------------------------------------------------------------------------------------------------------


def to_unit(frames: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32 in [-1, 1]."""
    values = torch.as_tensor(frames).movedim(-1, -3).to(torch.float32, copy=True)
    return values.div_(127.5).sub_(1)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """(..., 3, H, W) in [-1, 1] -> (..., H, W, 3) uint8 on the same device, rounded; values outside are clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_frames(path: Path, fps: int = FPS) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 RGB frames, upright, one every 1/fps s whatever the source's own rate.

    Frame k is what is on screen (k + 1/2)/fps seconds after the container's time 0, the zero of `audio.load_waveform`:
    at the middle of its own time, so that it is half a frame early or late at most, and on average neither. A video of
    d seconds gives round(d fps) frames. Damaged packets are skipped.
    Raises DheadsError for a missing or unreadable file and for one without pictures.
    """
    shown: av.VideoFrame | None = None
    count, end = 0, 0.0
    scaler = VideoReformatter()  # one for all frames: each would take as long to set up as to use
    for frame, begin, duration in _timed_frames(path):
        if begin + duration - end > _MAX_HOLD_SECONDS:
            raise DheadsError(f"{path} jumps from {end:.0f} s to {begin + duration:.0f} s: its time stamps are damaged")
        # Times are often rounded to milliseconds: a frame that is due within one counts as shown.
        while shown is not None and (count + 0.5) / fps < begin - 1e-3:
            yield _upright_rgb(shown, scaler)
            count += 1
        shown, end = frame, begin + duration
    if shown is None:
        raise DheadsError(f"{path} holds no picture that can be decoded")
    for _ in range(max(round(end * fps) - count, 1 - count)):
        yield _upright_rgb(shown, scaler)


def frame_at(path: Path, seconds: float = 0.0) -> np.ndarray:
    """(H, W, 3) uint8 RGB: what a video shows at that time. Raises DheadsError where it is shorter than that."""
    frame = next(islice(read_frames(path), round(seconds * FPS), None), None)
    if frame is None:
        raise DheadsError(f"{path} is shorter than {seconds:g} s; ask for an earlier time")
    return frame


def _timed_frames(path: Path) -> Iterator[tuple[av.VideoFrame, float, float]]:
    """(frame, begin in s, duration in s) of every frame of the first video stream."""
    with opened(path, str(path)) as container:
        stream = next((s for s in container.streams.video if s.codec_context), None)
        if stream is None:
            raise DheadsError(f"{path} holds no video stream that can be decoded; give a video")
        stream.thread_type = "AUTO"
        start = start_seconds(container)
        usual = float(1 / (stream.average_rate or FPS))
        begin = -usual
        for frame in decoded(container, stream):
            begin = begin + usual if frame.time is None else frame.time - start
            duration = float(frame.duration * frame.time_base) if frame.duration else usual
            yield frame, begin, duration


def _upright_rgb(frame: av.VideoFrame, scaler: VideoReformatter) -> np.ndarray:
    image = scaler.reformat(frame, format="rgb24", interpolation=SCALER).to_ndarray()
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))


# --- Writing ---------------------------------------------------------------------------------------------------------


class VideoWriter:
    """An MP4 that grows frame by frame: complete when it is closed, or absent. A stream becomes a fragmented MP4.

    As a context manager it is closed where its block ends well, and discarded where it fails; so it is where `add` or
    `close` fails. Both raise DheadsError for what cannot be written, as does opening one.
    """

    def __init__(
        self,
        target: Path | BinaryIO,
        sound: AbstractContextManager[AddSound],
        fps: int,
        tags: dict[str, str],
        x264_options: dict[str, str],
    ) -> None:
        self.count = 0  # frames so far
        self._target, self._fps = target, fps
        with ExitStack() as stack:
            add_sound = stack.enter_context(sound)
            stack.enter_context(_muxer_errors(target))
            if isinstance(target, Path):
                place, movflags = str(stack.enter_context(_complete_or_absent(target.absolute()))), "faststart"
            else:
                place, movflags = target, "frag_keyframe+delay_moov+default_base_moof"
            self._output = stack.enter_context(av.open(place, "w", format="mp4", options={"movflags": movflags}))
            self._output.metadata.update(tags | {"encoding_tool": _PROGRAM})
            self._video = self._output.add_stream("libx264", rate=fps, options=x264_options)
            self._video.pix_fmt = "yuv420p"
            self._video.color_primaries = self._video.color_trc = self._video.colorspace = _BT709
            self._video.color_range = ColorRange.MPEG
            self._scaler = VideoReformatter()  # one for all frames, as when reading
            self._sound = add_sound(self._output)
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
    target: Path | BinaryIO, audio: Path | BinaryIO | None, *, fps: int = FPS, comment: str | None = None
) -> VideoWriter:
    """A writer of H.264 in an MP4 that plays in browsers, beside the sound of `audio`.

    The sound is copied bit for bit where MP4 holds its codec and encoded to AAC where not. The metadata say that the
    video is AI-generated and by what; `comment` takes the place of that sentence.
    Raises DheadsError for a target that cannot be written and for unreadable sound.
    """
    tags = {
        "title": "AI-generated talking-head video",
        "comment": comment or f"AI-generated talking-head video made by {_PROGRAM}",
    }
    sound = nullcontext(_add_no_sound) if audio is None else _source_sound(audio)
    # A stream's fragments end at key frames, and its reader is waiting for the first.
    pace = {"g": "50"} if isinstance(target, Path) else {"g": "25", "tune": "zerolatency"}
    return VideoWriter(target, sound, fps, tags, {"crf": "16", "preset": "medium", **pace})


def write_video(
    target: Path | BinaryIO,
    frames: Iterable[np.ndarray],
    audio: Path | BinaryIO | None,
    *,
    fps: int = FPS,
    comment: str | None = None,
) -> int:
    """Encode (H, W, 3) uint8 RGB frames as they arrive, as `video_writer` does; returns how many there were.

    Raises DheadsError for a target that cannot be written and for unreadable sound, before a frame is asked for.
    """
    with video_writer(target, audio, fps=fps, comment=comment) as writer:
        for image in frames:
            writer.add(image)
    return writer.count


def write_clip(
    path: Path,
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
    sound = nullcontext(partial(_add_waveform, waveform, opus_kbps))
    options = {"crf": "6", "g": "1"} if x264_options is None else x264_options
    with VideoWriter(path, sound, FPS, {"title": "Prepared clip"}, options) as writer:
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


@contextmanager
def _complete_or_absent(target: Path) -> Iterator[Path]:
    """A temporary file beside `target` that takes its name if the block ends well, and vanishes if not."""
    part = part_of(target)
    if target.is_dir():
        raise DheadsError(f"cannot write {target}: it is a folder; give the name of a file")
    _unfinished.add(part)
    try:
        part.open("xb").close()
    except OSError as error:
        _unfinished.discard(part)
        raise DheadsError(
            f"cannot write {target}: {error.strerror}; choose a folder that exists and is yours"
        ) from error
    try:
        yield part
        try:
            part.replace(target)
        except OSError as error:
            raise DheadsError(f"cannot write {target}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
        _unfinished.discard(part)


def remove_unfinished() -> None:
    """Delete what is half-written; for a program that ends without unwinding."""
    for part in list(_unfinished):
        with suppress(OSError):
            part.unlink()


@contextmanager
def _muxer_errors(target: Path | BinaryIO) -> Iterator[None]:
    """A full disk or a closed pipe becomes a DheadsError."""
    try:
        yield
    except (av.FFmpegError, BrokenPipeError) as error:
        # PyAV passes on what a stream's write() raised, or hides it behind its own error.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise DheadsError(f"cannot write {name_of(target)}: {cause.strerror}") from error


# --- Sound for the writer: each adds its stream to the output and returns the packets to mux -------------------------


def _add_no_sound(output: av.container.OutputContainer) -> Iterator[av.Packet]:
    return iter(())


@contextmanager
def _source_sound(audio: Path | BinaryIO) -> Iterator[AddSound]:
    with opened(audio, name_of(audio)) as source:
        if not (source.streams.audio and source.streams.audio[0].codec_context):
            raise DheadsError(f"{name_of(audio)} holds no sound stream that can be read; give a file with speech in it")
        yield partial(_add_source_sound, source)


def _add_source_sound(source: av.container.InputContainer, output: av.container.OutputContainer) -> Iterator[av.Packet]:
    stream = source.streams.audio[0]
    codec = stream.codec_context
    if _fits_mp4(codec):
        return _copied_packets(source, stream, output.add_stream_from_template(stream))
    rate = min((r for r in _AAC_RATES if r >= codec.sample_rate), default=max(_AAC_RATES))
    layout = _AAC_LAYOUTS.get(codec.layout.nb_channels, "mono")
    out = output.add_stream("aac", rate=rate, layout=layout)
    out.bit_rate = 96_000 * out.layout.nb_channels
    return _encoded_packets(source, stream, out)


def _fits_mp4(codec: av.AudioCodecContext) -> bool:
    name = codec.codec.canonical_name
    if name == "mp3":
        return codec.sample_rate >= _MIN_MP3_RATE
    # MP4 wants the codec's header, which damaged files lack; AAC's it makes itself.
    return name in COPIED_CODECS and (name == "aac" or bool(codec.extradata))


def _copied_packets(
    source: av.container.InputContainer, stream: av.AudioStream, out: av.AudioStream
) -> Iterator[av.Packet]:
    last = None
    for packet in _plain_packets(source, stream):
        if packet.dts is None or (last is not None and packet.dts <= last):  # the end, or a damaged time stamp
            continue
        last = packet.dts
        start = round(start_seconds(source) / packet.time_base)
        packet.pts = (packet.dts if packet.pts is None else packet.pts) - start
        packet.dts -= start
        packet.stream = out
        yield packet


def _plain_packets(source: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.Packet]:
    """AAC that has its header in every packet, as in broadcasts, without. The muxer's own remedy fails in streams."""
    if stream.codec.canonical_name != "aac" or stream.codec_context.extradata:
        yield from packets(source, stream)
        return
    headless = BitStreamFilterContext("aac_adtstoasc", stream)
    for packet in packets(source, stream):
        with suppress(av.FFmpegError):  # a damaged packet, and what comes after the end
            yield from headless.filter(packet)


def _encoded_packets(
    source: av.container.InputContainer, stream: av.AudioStream, out: av.AudioStream
) -> Iterator[av.Packet]:
    # What the encoder has no layout for becomes one channel.
    mixed = stream.codec_context.layout.nb_channels not in _AAC_LAYOUTS
    position = 0  # samples
    for frame in decoded(source, stream):
        if frame.pts is None:
            frame.time_base, frame.pts = Fraction(1, frame.rate), position
        else:
            frame.pts -= round(start_seconds(source) / frame.time_base)
        position = round(frame.pts * frame.time_base * frame.rate) + frame.samples
        _repair_samples(frame)
        yield from out.encode(_as_mono(frame) if mixed else frame)
    yield from out.encode()


def _as_mono(frame: av.AudioFrame) -> av.AudioFrame:
    one = av.AudioFrame.from_ndarray(mono(frame)[None], format="fltp", layout="mono")
    one.rate, one.time_base, one.pts = frame.rate, frame.time_base, frame.pts
    return one


def _repair_samples(frame: av.AudioFrame) -> None:
    """In place: NaN and infinity, at which the AAC encoder stops, become 0; what exceeds the full scale is clipped."""
    kind = {"flt": np.float32, "fltp": np.float32, "dbl": np.float64, "dblp": np.float64}.get(frame.format.name)
    if kind:
        for plane in frame.planes:
            samples = np.frombuffer(plane, kind)
            np.nan_to_num(samples, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
            np.clip(samples, -1, 1, out=samples)


def _add_waveform(
    waveform: torch.Tensor, opus_kbps: int | None, output: av.container.OutputContainer
) -> Iterator[av.Packet]:
    if opus_kbps is None:  # FLAC: lossless, no priming samples, and browsers play it in MP4
        stream = output.add_stream("flac", rate=SAMPLE_RATE, layout="mono", format="s16")
    else:  # long packets: fewer entries in the container's tables
        options = {"frame_duration": "60"}
        stream = output.add_stream("libopus", rate=SAMPLE_RATE, layout="mono", format="s16", options=options)
        stream.bit_rate = 1000 * opus_kbps
    samples = (waveform * 32768).round().clamp(-32768, 32767).to(torch.int16).cpu().numpy()
    return _waveform_packets(samples, stream)


def _waveform_packets(samples: np.ndarray, stream: av.AudioStream) -> Iterator[av.Packet]:
    for begin in range(0, len(samples), SAMPLE_RATE):
        frame = av.AudioFrame.from_ndarray(samples[None, begin : begin + SAMPLE_RATE], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, begin, Fraction(1, SAMPLE_RATE)
        yield from stream.encode(frame)
    yield from stream.encode()
