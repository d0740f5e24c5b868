"""Hostile photos and sounds through `dheads sample`, with weights that nobody trained.

    OMP_NUM_THREADS=1 python benchmarks/fuzz.py --mutations 300 --seed 0 --keep faults

Each input runs in a process of its own. Exit codes 0 (with a video that can be decoded) and 1 (with one line that names
the file, and no video) are right; all else is a fault: a traceback, a signal, too much time or memory, a temporary file
left behind. Prints a markdown table, then the faults; exits with 1 where there are any. For Linux.
"""

from __future__ import annotations

import io
import os
import random
import resource
import signal
import struct
import sys
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import av
import cv2
import numpy as np
import torch
import typer
from PIL import Image
from pillow_heif import from_pillow

from dheads import cli
from dheads.config import override, preset
from dheads.extensions.network import ExtendedUNet
from dheads.media.containers import decoded
from dheads.weights.checkpoints import save_checkpoint

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
OUTPUT = "out.mp4"
PHOTO_PX = 192
SOUND_SECONDS = 0.4
# Files by their endings: the format's name in Pillow; the codec in FFmpeg.
PHOTO_FORMATS = {
    "jpg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "tif": "TIFF",
    "bmp": "BMP",
    "avif": "AVIF",
    "jp2": "JPEG2000",
    "ppm": "PPM",
}
VIDEO_CODECS = {"mov": "libx264", "webm": "libvpx", "avi": "mpeg4"}
SOUND_CODECS = {
    "wav": "pcm_s16le",
    "mp3": "libmp3lame",
    "m4a": "aac",
    "ogg": "flac",
    "opus": "libopus",
    "flac": "flac",
    "webm": "libopus",
    "mkv": "pcm_f32le",
    "ts": "aac",
    "mp4": "aac",
}
MUXERS = {"m4a": "mp4", "mkv": "matroska", "ts": "mpegts", "opus": "ogg"}  # by file ending, where not its own
MUXER_OPTIONS = {"ts": {"pes_payload_size": "0"}}  # a time with every packet
WITH_PICTURES = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx"}


# ---- Seeds ----


def photos() -> dict[str, bytes]:
    """The example's face in each format, by file ending; some are videos."""
    face = Image.open(EXAMPLES / "face.jpg").resize((PHOTO_PX, PHOTO_PX))
    made = {}
    for ending, name in PHOTO_FORMATS.items():
        file = io.BytesIO()
        face.save(file, name)
        made[ending] = file.getvalue()
    file = io.BytesIO()
    from_pillow(face).save(file, tile_size=128)
    made["heic"] = file.getvalue()
    return made | {ending: _video(face, ending, codec) for ending, codec in VIDEO_CODECS.items()}


def _video(face: Image.Image, ending: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=ending) as target:
        stream = target.add_stream(codec, rate=25)
        stream.width = stream.height = PHOTO_PX
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            target.mux(stream.encode(av.VideoFrame.from_image(face)))
        target.mux(stream.encode())
    return file.getvalue()


def sounds() -> dict[str, bytes]:
    """The example's first words in each format, by file ending; some beside a picture."""
    return {ending: _sound(ending, codec) for ending, codec in SOUND_CODECS.items()}


def _sound(ending: str, codec: str) -> bytes:
    file = io.BytesIO()
    muxer = {"format": MUXERS.get(ending, ending), "options": MUXER_OPTIONS.get(ending)}
    with (
        av.open(str(EXAMPLES / "speech.wav")) as source,
        av.open(file, "w", **muxer) as target,
    ):
        stream = target.add_stream(codec, rate=48_000, layout="mono")
        picture = target.add_stream(WITH_PICTURES[ending], rate=25) if ending in WITH_PICTURES else None
        if picture:
            picture.width = picture.height = 32
            picture.pix_fmt = "yuv420p"
        for frame in source.decode(audio=0):
            if frame.time > SOUND_SECONDS:
                break
            target.mux(stream.encode(frame))
            if picture:
                target.mux(picture.encode(av.VideoFrame(32, 32, "yuv420p")))
        target.mux(stream.encode())
        if picture:
            target.mux(picture.encode())
    return file.getvalue()


# ---- Mutations: each takes a file's content and returns another ----

HEADER = 200  # bytes
_EXTREMES = (b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\x00\x00\x00")

Mutation = Callable[[bytes, random.Random], bytes]


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def few_bits(content: bytes, rng: random.Random) -> bytes:
    return _flipped(content, rng, rng.randint(1, 8), len(content))


def many_bits(content: bytes, rng: random.Random) -> bytes:
    return _flipped(content, rng, max(1, len(content) // rng.choice((20, 200))), len(content))


def header_bits(content: bytes, rng: random.Random) -> bytes:
    return _flipped(content, rng, rng.randint(1, 8), HEADER)


def extreme_field(content: bytes, rng: random.Random) -> bytes:
    """Sizes, counts and rates that are zero, negative or huge."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(len(content), HEADER) - 4)
        changed[at : at + 4] = rng.choice(_EXTREMES)
    return bytes(changed)


def end_fields(content: bytes, rng: random.Random) -> bytes:
    """The same at the end, where MP4 and Matroska may have their index."""
    return content[: -2 * HEADER] + extreme_field(content[-2 * HEADER :], rng)


def hole(content: bytes, rng: random.Random) -> bytes:
    first, last = sorted(rng.choices(range(len(content)), k=2))
    return content[:first] + bytes(last - first) + content[last:]


def doubled(content: bytes, rng: random.Random) -> bytes:
    first, last = sorted(rng.choices(range(len(content)), k=2))
    return content[:last] + content[first:]


def missing_part(content: bytes, rng: random.Random) -> bytes:
    first, last = sorted(rng.choices(range(len(content)), k=2))
    return content[:first] + content[last:]


def shuffled(content: bytes, rng: random.Random) -> bytes:
    parts = [content[k : k + 64] for k in range(0, len(content), 64)]
    head, body = parts[:1], parts[1:]
    rng.shuffle(body)
    return b"".join(head + body)


def noise_after_header(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randint(8, HEADER)] + rng.randbytes(len(content))


MUTATIONS: tuple[Mutation, ...] = (
    cut,
    few_bits,
    many_bits,
    header_bits,
    extreme_field,
    end_fields,
    hole,
    doubled,
    missing_part,
    shuffled,
    noise_after_header,
)


def _flipped(content: bytes, rng: random.Random, count: int, end: int) -> bytes:
    changed = bytearray(content)
    for _ in range(count):
        changed[rng.randrange(min(end, len(content)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


# ---- Files made to be hostile ----

_PES = b"\0\0\1\xc0"  # where a packet of sound begins in MPEG-TS


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says it is so large; `rows` are its pixels, not compressed yet."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def large_picture(mode: str, side: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, kind)
    return file.getvalue()


def tiff(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """A TIFF of one directory; an entry is (tag, type, count, value), `following` where the next one is."""
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", following)


def wav(
    data: bytes = bytes(12_800),
    *,
    kind: int = 1,
    channels: int = 1,
    rate: int = 16_000,
    bits: int = 16,
    size: int | None = None,
) -> bytes:
    """A WAV whose header may say anything."""
    block = channels * bits // 8
    layout = struct.pack("<HHIIHH", kind, channels, rate, rate * block % 2**32, block % 2**16, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(layout)) + layout
    body += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def nested_boxes(depth: int) -> bytes:
    """An MP4 whose movie box holds a movie box and so on."""
    content = b""
    for _ in range(depth):
        content = struct.pack(">I4s", len(content) + 8, b"moov") + content
    return struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + content


def nested_elements(depth: int) -> bytes:
    """A Matroska file of tags within tags, each of unknown size."""
    tags, tag, unknown = b"\x12\x54\xc3\x67", b"\x73\x73", b"\x01" + b"\xff" * 7
    return _sound("mkv", "flac")[:40] + (tags + unknown + tag + unknown) * depth


def boxed(kind: bytes, change: Callable[[bytearray, int], None]) -> bytes:
    """An M4A after `change` of what follows the name of its first box of that kind."""
    content = bytearray(_sound("m4a", "aac"))
    change(content, content.index(kind) + 4)
    return bytes(content)


def late_stamp() -> bytes:
    """An MPEG-TS with one flipped bit, in the third sound packet's time: six minutes late."""
    content = bytearray(_sound("ts", "aac"))
    third = content.index(_PES, content.index(_PES, content.index(_PES) + 1) + 1)
    content[third + 10] ^= 8  # of the time in 90 kHz the bit 25
    return bytes(content)


def frames_only() -> bytes:
    """A FLAC without its header, which MP4 would need."""
    content = _sound("flac", "flac")
    return content[content.index(b"\xff\xf8") :]


def _field(offset: int, value: int) -> Callable[[bytearray, int], None]:
    return lambda content, at: struct.pack_into(">I", content, at + offset, value)


def floats(value: float) -> bytes:
    samples = np.sin(np.arange(6400) / 20).astype("<f4")
    samples[::7] = value
    return wav(samples.tobytes(), kind=3, bits=32)


def late_sound(seconds: float) -> bytes:
    """A Matroska file whose second packet comes so much later."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as target:
        stream = target.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for at in (0, seconds):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16_000, round(at * 16_000)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return file.getvalue()


def gif(side: int) -> bytes:
    """A GIF of one pixel on a screen that is so large."""
    content = large_picture("L", 1, "GIF")
    return content[:6] + struct.pack("<HH", side, side) + content[10:]


def bmp(width: int, height: int) -> bytes:
    """The header of a BMP that says it is so large."""
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, width, height, 1, 24, *[0] * 6)


BAD_PHOTOS: dict[str, Callable[[], bytes]] = {
    "empty.jpg": bytes,
    "zeros.png": lambda: bytes(10_000),
    "claims-3.6-gigapixels.png": lambda: png(60_000, 60_000, 8, 2, bytes(1000)),
    "claims-2-gigapixels.png": lambda: png(2**31 - 1, 1, 8, 2, bytes(1000)),
    "no-pixels.png": lambda: png(0, 0, 8, 2, b""),
    "19000px-gray.png": lambda: png(19_000, 19_000, 1, 0, bytes(19_000 * 2376)),
    "19000px-rgba.png": lambda: png(19_000, 19_000, 8, 6, bytes(19_000)),  # cut off after the first rows
    "19000px-16-bit.png": lambda: png(19_000, 19_000, 16, 0, bytes(19_000)),
    "9000px-rgba.png": lambda: png(9_000, 9_000, 8, 6, bytes(9_000 * 36_001)),
    "9000px-16-bit.png": lambda: png(9_000, 9_000, 16, 0, bytes(9_000 * 18_001)),
    "14000px.png": lambda: png(14_000, 14_000, 1, 0, bytes(14_000 * 1_751)),
    "16383px.webp": lambda: b"RIFF\x24\0\0\0WEBPVP8L\x18\0\0\0\x2f\xfe\xff\xff\x0f" + bytes(19),
    "one-pixel.png": lambda: large_picture("RGB", 1, "PNG"),
    "line.png": lambda: png(20_000, 1, 8, 0, bytes(20_001)),
    "column.png": lambda: png(1, 20_000, 8, 0, bytes(40_000)),
    "text-bomb.png": lambda: png(
        32, 32, 8, 0, bytes(33 * 32), (b"zTXt", b"a\0\0" + zlib.compress(bytes(300_000_000), 9))
    ),
    "profile-bomb.png": lambda: png(
        32, 32, 8, 0, bytes(33 * 32), (b"iCCP", b"a\0\0" + zlib.compress(bytes(300_000_000), 9))
    ),
    "loop.tif": lambda: tiff((256, 3, 1, 64), (257, 3, 1, 64), following=8),
    "loop-exif.tif": lambda: tiff((256, 3, 1, 64), (257, 3, 1, 64), (34665, 4, 1, 8)),
    "4-billion-values.tif": lambda: tiff((256, 3, 2**32 - 1, 8), (257, 4, 2**32 - 1, 8)),
    "claims-4-gigapixels.tif": lambda: tiff((256, 4, 1, 65_535), (257, 4, 1, 65_535), (273, 4, 1, 8), (262, 3, 1, 1)),
    "claims-4-gigapixels.gif": lambda: gif(65_535),
    "19000px.gif": lambda: gif(19_000),
    "claims-4-gigapixels.bmp": lambda: bmp(65_535, 65_535),
    "negative.bmp": lambda: bmp(-(2**31), -(2**31)),
    "huge-box.jp2": lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">I4sQ", 1, b"jp2h", 2**62),
    "19000px.ppm": lambda: b"P6 19000 19000 255\n" + bytes(1000),
    "19000px-text.ppm": lambda: b"P3 19000 19000 255\n" + b"1 " * 1000,
    "endless-number.ppm": lambda: b"P6 " + b"9" * 1_000_000,
    "program.eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "drawing.svg": lambda: b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg>&a;</svg>',
    "sound.jpg": lambda: wav(),
}

BAD_SOUNDS: dict[str, Callable[[], bytes]] = {
    "empty.wav": bytes,
    "zeros.wav": lambda: bytes(10_000),
    "claims-4-gigabytes.wav": lambda: wav(size=2**32 - 1),
    "no-samples.wav": lambda: wav(b""),
    "one-sample.wav": lambda: wav(bytes(2)),
    "half-a-sample.wav": lambda: wav(bytes(1)),
    "rate-0.wav": lambda: wav(rate=0),
    "rate-1.wav": lambda: wav(rate=1),
    "rate-999983.wav": lambda: wav(rate=999_983),
    "rate-15991.wav": lambda: wav(rate=15_991),
    "rate-4-billion.wav": lambda: wav(rate=2**32 - 1),
    "rate-negative.wav": lambda: wav(rate=2**31),
    "no-channels.wav": lambda: wav(channels=0),
    "9-channels.wav": lambda: wav(channels=9),
    "64-channels.wav": lambda: wav(bytes(64 * 12_800), channels=64),
    "65535-channels.wav": lambda: wav(bytes(1_000_000), channels=65_535),
    "no-bits.wav": lambda: wav(bits=0),
    "65535-bits.wav": lambda: wav(bits=65_535),
    "24-bit-floats.wav": lambda: wav(kind=3, bits=24),
    "nan.wav": lambda: floats(np.nan),
    "infinite.wav": lambda: floats(np.inf),
    "1e38.wav": lambda: floats(1e38),
    "only-nan.wav": lambda: wav(np.full(6400, np.nan, "<f4").tobytes(), kind=3, bits=32),
    "doubles-1e308.wav": lambda: wav(np.full(6400, 1e308, "<f8").tobytes(), kind=3, bits=64),
    "adpcm.wav": lambda: wav(kind=2, bits=4),
    "nested.wav": lambda: b"RIFF\xff\xff\xff\xffWAVE" + b"LIST\xff\xff\xff\x7fINFO" * 20_000,
    "nested.mp4": lambda: nested_boxes(20_000),
    "nested.mkv": lambda: nested_elements(5_000),
    "huge-box.m4a": lambda: struct.pack(">I4s4sII4sQ", 16, b"ftyp", b"isom", 0, 1, b"moov", 2**63 - 1),
    "samples-4-billion.m4a": lambda: boxed(b"stsz", _field(8, 2**32 - 1)),
    "samples-of-4-gigabytes.m4a": lambda: boxed(b"stsz", _field(4, 2**32 - 1)),
    "chunks-4-billion.m4a": lambda: boxed(b"stco", _field(4, 2**32 - 1)),
    "times-4-billion.m4a": lambda: boxed(b"stts", _field(4, 2**32 - 1)),
    "time-scale-0.m4a": lambda: boxed(b"mdhd", _field(12, 0)),
    "time-scale-1.m4a": lambda: boxed(b"mdhd", _field(12, 1)),
    "late.m4a": lambda: boxed(b"elst", _field(8, 2**31)),
    "gap-of-a-second.mkv": lambda: late_sound(1),
    "gap-of-a-year.mkv": lambda: late_sound(3e7),
    "late-stamp.ts": late_stamp,
    "tag-of-256-megabytes.mp3": lambda: b"ID3\4\0\0\x7f\x7f\x7f\x7f" + bytes(10_000),
    "header-only.flac": lambda: b"fLaC\x80\0\0\x22" + bytes(34),
    "frames-only.flac": frames_only,
    "picture-of-16-megabytes.flac": lambda: b"fLaC\x06\xff\xff\xff" + bytes(1000),
    "page-of-nothing.ogg": lambda: (b"OggS\0\2" + bytes(20) + b"\0") * 1000,
    "playlist.m3u8": lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "playlist-of-itself.wav": lambda: b"#EXTM3U\n#EXTINF:9,\nplaylist-of-itself.wav\n",
    "list.ffconcat": lambda: b"ffconcat version 1.0\nfile '/etc/hostname'\nfile 'list.ffconcat'\n",
    "session.sdp": lambda: b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    "manifest.mpd": lambda: b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="dynamic"></MPD>',
    "claims-4-gigapixels.y4m": lambda: b"YUV4MPEG2 W65535 H65535 F25:1\nFRAME\n" + bytes(1000),
    "photo.wav": lambda: photos()["jpg"],
    "subtitles.srt": lambda: b"1\n00:00:00,000 --> 00:00:01,000\nHello\n",
}


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


# Names that are no files.
ODD_PATHS: dict[str, Callable[[Path], None]] = {
    "folder": Path.mkdir,
    "absent": lambda path: None,
    "fifo": _fifo,
    "loop": _loop,
    "link-to-zero": lambda path: path.symlink_to("/dev/zero"),
    "link-to-null": lambda path: path.symlink_to("/dev/null"),
    "link-to-random": lambda path: path.symlink_to("/dev/urandom"),
    "link-to-memory": lambda path: path.symlink_to("/proc/self/mem"),
    "link-to-nothing": lambda path: path.symlink_to("nowhere"),
    "new\nline": lambda path: path.write_bytes(b"text"),
    "bytes-\udcff": lambda path: path.write_bytes(b"text"),
    "\x1b[31mred": lambda path: path.write_bytes(b"text"),
    "http:": lambda path: path.write_bytes(b"text"),
    "x" * 300: lambda path: None,
}


# ---- Cases ----


@dataclass(frozen=True)
class Case:
    """One input: a file that `make` puts at a path of that name."""

    kind: str
    name: str
    is_photo: bool
    make: Callable[[Path], object]


def cases(count: int, seed: int) -> Iterator[Case]:
    """All that are made to be hostile, then mutations of good files, `count` in all or some more."""
    made = list(_crafted())
    yield from made
    yield from mutations(max(0, count - len(made)), seed)


def _crafted() -> Iterator[Case]:
    for is_photo, table in ((True, BAD_PHOTOS), (False, BAD_SOUNDS)):
        for name, content in table.items():
            yield Case("crafted", name, is_photo, lambda path, content=content: path.write_bytes(content()))
        for name, make in ODD_PATHS.items():
            yield Case("no file", name, is_photo, make)


def mutations(count: int, seed: int) -> Iterator[Case]:
    """Mutations of good files, in turn of photos and sounds."""
    rng = random.Random(seed)
    pictures, recordings = photos(), sounds()
    for number in range(count):
        is_photo = number % 2 == 0
        seeds = pictures if is_photo else recordings
        ending = rng.choice(list(seeds))
        if number % 20 < 2:  # any file by any name
            content, kind = rng.choice(list((pictures | recordings).values())), "wrong ending"
        else:
            mutation = rng.choice(MUTATIONS)
            content, kind = mutation(seeds[ending], rng), mutation.__name__.replace("_", " ")
        yield Case(kind, f"{number:04}.{ending}", is_photo, lambda path, content=content: path.write_bytes(content))


# ---- Running ----


@dataclass(frozen=True)
class Limits:
    seconds: int
    megabytes: int


def run(case: Case, good: Path, limits: Limits) -> tuple[str, list[str]]:
    """What became of one input, and the faults. `good` holds face.png, speech.wav and weights.safetensors."""
    with TemporaryDirectory() as folder:
        home = Path(folder)
        given = home / "in" / case.name
        given.parent.mkdir()
        case.make(given)
        (home / "out").mkdir()
        photo, sound = (given, good / "speech.wav") if case.is_photo else (good / "face.png", given)
        args = ["sample", photo, sound, "-o", home / "out" / OUTPUT, "--weights", good / "weights.safetensors"]
        args += ["--steps", "1", "--device", "cpu", "--quiet"]
        log = home / "log"
        child = os.fork()
        if child == 0:
            _command([str(arg) for arg in args], log, limits)
        _, status, used = os.wait4(child, 0)
        said = log.read_text(errors="replace") if log.exists() else ""
        return _judged(os.waitstatus_to_exitcode(status), said, used.ru_maxrss / 1024, str(given), home / "out", limits)


def _command(args: list[str], log: Path, limits: Limits) -> None:
    """The command line in this forked process, which ends here."""
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # A busy machine is no fault, a process that waits for ever is.
        resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 1))
        signal.alarm(6 * limits.seconds)
        # Address space is more than memory: this only keeps the machine alive, the peak is measured.
        resource.setrlimit(resource.RLIMIT_AS, (3 * limits.megabytes * 2**20,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**30,) * 2)
        cli.app(args)
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _judged(code: int, said: str, megabytes: float, name: str, folder: Path, limits: Limits) -> tuple[str, list[str]]:
    faults = []
    late = code in (-signal.SIGXCPU, -signal.SIGALRM)
    if late:
        faults.append(f"took more than {limits.seconds} s")
    elif code not in (0, 1):
        faults.append(f"exit code {code}: {said[-1500:]}")
    if megabytes > limits.megabytes:
        faults.append(f"took {megabytes:.0f} MB")
    names = {path.name for path in folder.iterdir()}
    if code == 0 and (fault := _undecodable(folder / OUTPUT)):
        faults.append(fault)
    if code == 1:
        if not said.startswith("error: ") or said.count("\n") != 1:
            faults.append(f"no single line: {said!r}")
        if "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) not in said:
            faults.append(f"a message that does not name the file: {said!r}")
        if OUTPUT in names:
            faults.append("a video beside an error")
    if not late and (left := names - {OUTPUT}):
        faults.append(f"left {left} behind")
    outcome = "fault" if faults else "video" if code == 0 else "refused"
    return outcome, [*faults, said.strip()[:300]] if faults else [said.strip()[:300]]


def _undecodable(path: Path) -> str | None:
    """What is wrong with a video that was said to be made."""
    if not path.exists():
        return "no video"
    for kind in ("video", "audio"):
        try:
            with av.open(str(path)) as container:
                # Sound that is copied keeps its damaged packets, and players skip those.
                next(decoded(container, container.streams.get(**{kind: 0})[0]))
        except (av.FFmpegError, StopIteration, IndexError) as error:
            return f"a video whose {kind} cannot be decoded: {error!r}"
    return None


def prepare(folder: Path) -> None:
    """Good input: face.png, speech.wav and weights.safetensors, untrained."""
    (folder / "face.png").write_bytes(photos()["png"])
    (folder / "speech.wav").write_bytes(sounds()["wav"])
    torch.manual_seed(0)
    config = override(preset("tiny"), {"sampling": {"steps": 1, "solver": "ddim"}})
    save_checkpoint(folder / "weights.safetensors", ExtendedUNet(config).state_dict(), config, {})


def main(
    mutations: Annotated[int, typer.Option(min=1, help="Inputs in all.")] = 300,
    seed: Annotated[int, typer.Option(help="The same seed makes the same inputs.")] = 0,
    seconds: Annotated[int, typer.Option(min=1, help="Processor time an input may take (x 6: the clock).")] = 10,
    megabytes: Annotated[int, typer.Option(min=1, help="An input may take so much memory.")] = 2500,
    only: Annotated[str, typer.Option(help="Only inputs whose kind or name holds this.")] = "",
    keep: Annotated[Path | None, typer.Option(help="Folder for the inputs that find faults.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print what became of each input.")] = False,
) -> None:
    """Send hostile photos and sounds through `dheads sample`."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    import dheads.sampling.lists  # noqa: F401  (loaded once, before the processes are forked)

    counts: Counter[tuple[str, str]] = Counter()
    found = []
    with TemporaryDirectory() as folder:
        good = Path(folder)
        prepare(good)
        for case in cases(mutations, seed):
            if only not in f"{case.kind} {case.name}":
                continue
            outcome, lines = run(case, good, Limits(seconds, megabytes))
            counts[case.kind, outcome] += 1
            what = f"{'photo' if case.is_photo else 'sound'} {case.kind} {case.name[:80]!r}: "
            if verbose:
                print(outcome, what, *lines, flush=True)
            if outcome == "fault":
                found.append(what + "; ".join(lines))
                if keep:
                    place = keep / f"{len(found)} {case.kind}" / case.name
                    place.parent.mkdir(parents=True)
                    case.make(place)
    print("| | video | refused | fault |\n|---|---|---|---|")
    for kind in dict.fromkeys(kind for kind, _ in counts):
        print(f"| {kind} |", *(f"{counts[kind, outcome]} |" for outcome in ("video", "refused", "fault")))
    print(*found, sep="\n")
    raise typer.Exit(1 if found else 0)


if __name__ == "__main__":
    typer.run(main)
