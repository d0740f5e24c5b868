"""Frames out of any video at 25 fps, and frames into an MP4 with its sound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from dheads import __version__
from dheads.config import FPS, SAMPLE_RATE
from dheads.errors import DheadsError
from dheads.files import part_of
from dheads.media import decoded, name_of, opened, packets, start_seconds

VIDEOS = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".flv", ".mpg", ".mpeg", ".m4v"})  # file endings
# Sound that is copied as it is: MP4 holds these, and browsers or their systems play them.
COPIED_CODECS = frozenset({"aac", "mp3", "alac", "flac", "opus"})
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
_AAC_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}  # by number of channels
_PROGRAM = f"dheads {__version__}"
_MAX_HOLD_SECONDS = 600  # one picture on screen for longer is a damaged time stamp
_BT709 = 1  # the number of BT.709 in H.264's tables of primaries, transfer and matrix
# Without these, swscale takes the nearest chroma sample and rounds down.
SCALER = (
    Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND
)


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


def write_video(
    target: Path | BinaryIO,
    frames: Iterable[np.ndarray],
    audio: Path | BinaryIO | None,
    *,
    fps: int = FPS,
    comment: str | None = None,
) -> int:
    """Encode (H, W, 3) uint8 RGB frames as they arrive, beside the sound of `audio`; returns how many there were.

    H.264 in an MP4 that plays in browsers. The sound is copied bit for bit where MP4 holds its codec and encoded to AAC
    where not. A file appears under its name when complete, or not at all; a stream is written as a fragmented MP4.
    The metadata say that the video is AI-generated and by what; `comment` takes the place of that sentence.
    Raises DheadsError for a target that cannot be written and for unreadable sound, before a frame is asked for.
    """
    with ExitStack() as stack:
        source = stack.enter_context(opened(audio, name_of(audio))) if audio is not None else None
        if source and not (source.streams.audio and source.streams.audio[0].codec_context):
            raise DheadsError(f"{name_of(audio)} holds no sound stream that can be read; give a file with speech in it")
        sound = partial(_add_source_sound, source) if source else _add_no_sound
        tags = {
            "title": "AI-generated talking-head video",
            "comment": comment or f"AI-generated talking-head video made by {_PROGRAM}",
        }
        return _write(target, frames, sound, fps, tags, {"crf": "16", "preset": "medium", "g": "50"})


def write_clip(path: Path, frames: Iterable[np.ndarray], waveform: torch.Tensor) -> int:
    """Write a prepared clip: 25 fps, every frame a near-lossless key frame, lossless 16 kHz sound (N,).

    Returns the number of frames. Raises DheadsError for a path that cannot be written.
    """
    return _write(
        path, frames, partial(_add_waveform, waveform), FPS, {"title": "Prepared clip"}, {"crf": "6", "g": "1"}
    )


def _write(
    target: Path | BinaryIO,
    frames: Iterable[np.ndarray],
    add_sound: Callable[[av.container.OutputContainer], Iterator[av.Packet]],
    fps: int,
    tags: dict[str, str],
    x264_options: dict[str, str],
) -> int:
    with ExitStack() as stack:
        stack.enter_context(_muxer_errors(target))
        if isinstance(target, Path):
            place, movflags = str(stack.enter_context(_complete_or_absent(target.absolute()))), "faststart"
        else:
            place, movflags = target, "frag_keyframe+delay_moov+default_base_moof"
        output = stack.enter_context(av.open(place, "w", format="mp4", options={"movflags": movflags}))
        output.metadata.update(tags | {"encoding_tool": _PROGRAM})
        video = output.add_stream("libx264", rate=fps, options=x264_options)
        video.pix_fmt = "yuv420p"
        video.color_primaries = video.color_trc = video.colorspace = _BT709
        video.color_range = ColorRange.MPEG
        sound = add_sound(output)
        pending = next(sound, None)
        count = 0
        for image in frames:
            if count == 0:
                video.height, video.width = image.shape[:2]
                if video.height % 2 or video.width % 2:
                    raise DheadsError(f"frames of {video.width} x {video.height} px cannot be written; make both even")
            # Interleave: a stream's reader gets the sound with the picture, not after it.
            while pending and pending.dts * pending.time_base <= count / fps:
                output.mux(pending)
                pending = next(sound, None)
            output.mux(video.encode(_yuv(image, count)))
            count += 1
        if count == 0:
            raise DheadsError(f"there is no frame to write to {target}")
        output.mux(video.encode())
        for packet in chain([pending] if pending else [], sound):
            output.mux(packet)
    return count


def _yuv(image: np.ndarray, index: int) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=SCALER,
    )
    frame.pts = index
    return frame


@contextmanager
def _complete_or_absent(target: Path) -> Iterator[Path]:
    """A temporary file beside `target` that takes its name if the block ends well, and vanishes if not."""
    part = part_of(target)
    if target.is_dir():
        raise DheadsError(f"cannot write {target}: it is a folder; give the name of a file")
    try:
        part.open("xb").close()
    except OSError as error:
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


def _add_source_sound(source: av.container.InputContainer, output: av.container.OutputContainer) -> Iterator[av.Packet]:
    stream = source.streams.audio[0]
    codec = stream.codec_context
    if codec.codec.canonical_name in COPIED_CODECS:
        return _copied_packets(source, stream, output.add_stream_from_template(stream))
    rate = min((r for r in _AAC_RATES if r >= codec.sample_rate), default=max(_AAC_RATES))
    layout = _AAC_LAYOUTS.get(codec.layout.nb_channels, "stereo")
    out = output.add_stream("aac", rate=rate, layout=layout)
    out.bit_rate = 96_000 * out.layout.nb_channels
    return _encoded_packets(source, stream, out)


def _copied_packets(
    source: av.container.InputContainer, stream: av.AudioStream, out: av.AudioStream
) -> Iterator[av.Packet]:
    last = None
    for packet in packets(source, stream):
        if packet.dts is None or (last is not None and packet.dts <= last):  # the end, or a damaged time stamp
            continue
        last = packet.dts
        start = round(start_seconds(source) / packet.time_base)
        packet.pts = (packet.dts if packet.pts is None else packet.pts) - start
        packet.dts -= start
        packet.stream = out
        yield packet


def _encoded_packets(
    source: av.container.InputContainer, stream: av.AudioStream, out: av.AudioStream
) -> Iterator[av.Packet]:
    for frame in decoded(source, stream):
        if frame.pts is not None:
            frame.pts -= round(start_seconds(source) / frame.time_base)
        _silence_bad_samples(frame)
        yield from out.encode(frame)
    yield from out.encode()


def _silence_bad_samples(frame: av.AudioFrame) -> None:
    """NaN and infinity, at which the AAC encoder would stop, become 0, in place."""
    kind = {"flt": np.float32, "fltp": np.float32, "dbl": np.float64, "dblp": np.float64}.get(frame.format.name)
    if kind:
        for plane in frame.planes:
            np.nan_to_num(np.frombuffer(plane, kind), copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def _add_waveform(waveform: torch.Tensor, output: av.container.OutputContainer) -> Iterator[av.Packet]:
    # FLAC: lossless, no priming samples, and browsers play it in MP4.
    stream = output.add_stream("flac", rate=SAMPLE_RATE, layout="mono", format="s16")
    samples = (waveform * 32768).round().clamp(-32768, 32767).to(torch.int16).cpu().numpy()
    return _waveform_packets(samples, stream)


def _waveform_packets(samples: np.ndarray, stream: av.AudioStream) -> Iterator[av.Packet]:
    for begin in range(0, len(samples), SAMPLE_RATE):
        frame = av.AudioFrame.from_ndarray(samples[None, begin : begin + SAMPLE_RATE], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, begin, Fraction(1, SAMPLE_RATE)
        yield from stream.encode(frame)
    yield from stream.encode()
