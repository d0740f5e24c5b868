"""Frames at 25 fps from any video, and MP4 files whose picture and sound belong together."""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from dheads import __version__
from dheads.errors import DheadsError
from dheads.media.sound import load_waveform
from dheads.media.video import (
    frame_at,
    read_frames,
    to_uint8,
    to_unit,
    video_writer,
    write_clip,
    write_video,
)
from dheads.system.signals import undo_all


def gray(index: int, size: int = 64) -> np.ndarray:
    """A frame that carries its number as its brightness."""
    return np.full((size, size, 3), 16 + 4 * index, np.uint8)


def number(frame: np.ndarray) -> int:
    return round((float(frame.mean()) - 16) / 4)


def write_pictures(path: Path, times: list[Fraction], ticks: int = 90_000, size: int = 64) -> None:
    """A video whose frame number i appears at times[i] seconds and stays until the next; the last for 1/25 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width = stream.height = size
        stream.codec_context.time_base = Fraction(1, ticks)
        ends = [*times[1:], times[-1] + Fraction(1, 25)]
        for index, (begin, end) in enumerate(zip(times, ends, strict=True)):
            frame = av.VideoFrame.from_ndarray(gray(index, size))
            frame.pts, frame.time_base = round(begin * ticks), Fraction(1, ticks)
            frame.duration = round(end * ticks) - frame.pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_sound(path: Path, codec: str, rate: int, layout: str = "mono", seconds: float = 2.0) -> None:
    """Noise bursts: sound whose every moment differs."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options={"strict": "-2"})
        t = np.arange(round(seconds * rate)) / rate
        wave = 0.3 * np.sin(2 * np.pi * (200 + 300 * t) * t) * (np.sin(2 * np.pi * 2.7 * t) > 0)
        for begin in range(0, len(t), 1000):
            part = np.repeat(wave[None, begin : begin + 1000], stream.layout.nb_channels, 0).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def boxes(data: bytes) -> list[str]:
    """The names of an MP4 file's outermost boxes, in order."""
    names, at = [], 0
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        names.append(name.decode())
        at += size
    return names


# --- Pixels ----------------------------------------------------------------------------------------------------------


def test_all_pixel_values_make_the_round_trip():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    unit = to_unit(frames)
    assert (unit.shape, unit.dtype) == ((1, 3, 16, 16), torch.float32)
    assert (unit.min(), unit.max()) == (-1, 1)
    assert np.array_equal(to_uint8(unit).numpy(), frames)
    assert torch.equal(to_unit(torch.from_numpy(frames)), unit)


def test_axes_rounding_and_clamping():
    frame = np.zeros((4, 6, 3), np.uint8)
    frame[1, 2, 0] = 255
    assert to_unit(frame)[0, 1, 2] == 1
    x = torch.tensor([-7.0, 7.0, 0.0, 1 / 127.5 * 0.4]).expand(2, 3, 1, 4)
    assert to_uint8(x).shape == (2, 1, 4, 3)
    assert to_uint8(x)[1, 0, :, 2].tolist() == [0, 255, 128, 128]
    assert to_uint8(x.bfloat16()).dtype == torch.uint8


# --- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(25), Fraction(30_000, 1_001), Fraction(30), Fraction(50)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_any_frame_rate_is_shown_at_25_fps(tmp_path, rate, suffix):
    count = 40
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "4"})
        stream.width = stream.height = 64
        for index in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(gray(index))))
        container.mux(stream.encode())
    shown = [number(frame) for frame in read_frames(tmp_path / f"a.{suffix}")]
    assert len(shown) == round(count / rate * 25)
    # At t = (k + 1/2)/25 s the source shows its frame floor(t rate), or the next where that is due in a millisecond;
    # Matroska rounds to milliseconds itself.
    for k, index in enumerate(shown):
        t = Fraction(2 * k + 1, 50)
        early, late = (min(int((t + Fraction(ms) / 1000) * rate), count - 1) for ms in ("0.5", "1.5"))
        assert early <= index <= late


def test_variable_frame_rate_goes_by_time_stamps(tmp_path):
    times = [Fraction(ms, 1000) for ms in (0, 10, 50, 200, 210, 220, 500, 530)]
    write_pictures(tmp_path / "a.mp4", times)
    shown = [number(frame) for frame in read_frames(tmp_path / "a.mp4")]
    assert shown == [max(i for i, time in enumerate(times) if time <= Fraction(2 * k + 1, 50)) for k in range(14)]
    assert len(shown) == 14  # 0.57 s


def test_other_output_rates(tmp_path):
    write_pictures(tmp_path / "a.mp4", [Fraction(k, 25) for k in range(20)])
    assert [number(frame) for frame in read_frames(tmp_path / "a.mp4", fps=5)] == [2, 7, 12, 17]
    assert [number(frame) for frame in read_frames(tmp_path / "a.mp4", fps=50)] == [k // 2 for k in range(40)]


def test_time_zero_is_the_containers(tmp_path):
    # MPEG-TS begins at any time; a picture that starts late stands still until then.
    write_pictures(tmp_path / "a.ts", [Fraction(k, 25) + 7 for k in range(10)])
    assert [number(frame) for frame in read_frames(tmp_path / "a.ts")] == list(range(10))


@pytest.mark.parametrize(("degrees", "matrix"), [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))])
def test_rotated_recordings_are_shown_upright(tmp_path, degrees, matrix):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height = 96, 64
        picture = np.zeros((64, 96, 3), np.uint8)
        picture[:32, :48] = 255  # the top left quarter
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 4 + 40, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(data)
    frame = frame_at(tmp_path / "a.mp4")
    # The track header's matrix turns the picture clockwise.
    truth = np.rot90(picture, -degrees // 90)
    assert frame.shape == truth.shape
    assert np.abs(frame.astype(int) - truth).mean() < 6
    assert frame.flags.c_contiguous


def test_frame_at(tmp_path):
    write_pictures(tmp_path / "a.mp4", [Fraction(k, 25) for k in range(10)])
    assert number(frame_at(tmp_path / "a.mp4")) == 0
    assert number(frame_at(tmp_path / "a.mp4", 0.2)) == 5
    assert number(frame_at(str(tmp_path / "a.mp4"), 0.239)) == 5  # until frame 6 begins
    assert number(frame_at(tmp_path / "a.mp4", 0.399)) == 9
    assert [number(frame_at(tmp_path / "a.mp4", k / 25)) for k in range(10)] == list(range(10))
    with pytest.raises(DheadsError, match=r"shorter than 0\.4 s"):
        frame_at(tmp_path / "a.mp4", 0.4)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animated_pictures_are_videos(tmp_path, name):
    first, *others = (Image.fromarray(gray(index)) for index in range(5))
    first.save(tmp_path / name, save_all=True, append_images=others, duration=[80, 40, 200, 20, 100], lossless=True)
    shown = [number(frame) for frame in read_frames(str(tmp_path / name))]
    assert shown == [0, 0, 1, 2, 2, 2, 2, 2, 4, 4, 4]  # 0.44 s; the fourth is due between two frames
    assert number(frame_at(tmp_path / name, 0.1)) == 1


def test_real_clips(shared):
    expected = {
        "grid/s1_bbal7s.mp4": (75, 224),
        "hdtf/RD_Radio2_000.mp4": (200, 256),
        "talkvid/Age_19-30_1.mp4": (126, 256),  # 121 frames at 24 fps
    }
    for name, (count, size) in expected.items():
        frames = list(read_frames(shared / "data" / name))
        assert len(frames) == count
        assert {(frame.shape, frame.dtype.name) for frame in frames} == {((size, size, 3), "uint8")}
        steps = [float(np.abs(a.astype(int) - b).mean()) for a, b in itertools.pairwise(frames)]
        assert 0 < np.median(steps) < 10  # alive, and no jumble


def test_a_file_cut_short_gives_what_it_holds(tmp_path):
    write_pictures(tmp_path / "a.ts", [Fraction(k, 25) for k in range(50)], size=128)
    data = (tmp_path / "a.ts").read_bytes()
    (tmp_path / "cut.ts").write_bytes(data[: len(data) // 2])
    shown = [number(frame) for frame in read_frames(tmp_path / "cut.ts")]
    assert 15 < len(shown) < 45
    assert shown[:15] == list(range(15))  # the cut spoils the pictures next to it


def test_unusable_video_is_one_sentence(tmp_path):
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    write_sound(tmp_path / "sound.wav", "pcm_s16le", 16_000)
    write_pictures(tmp_path / "jump.mkv", [Fraction(0), Fraction(1, 25), Fraction(5_000)])
    for name, said in {
        "missing.mp4": "No such file",
        "text.mp4": "not a video or sound file",
        "sound.wav": "holds no video stream",
        "jump.mkv": "time stamps are damaged",
    }.items():
        with pytest.raises(DheadsError, match=said) as raised:
            list(read_frames(tmp_path / name))
        assert name in str(raised.value)
        assert "\n" not in str(raised.value)


# --- Writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "codec", "rate", "layout"),
    [
        ("a.m4a", "aac", 44_100, "mono"),
        ("a.mp4", "aac", 48_000, "5.1"),
        ("a.mkv", "aac", 22_050, "stereo"),
        ("a.mp3", "libmp3lame", 44_100, "stereo"),
        ("b.m4a", "alac", 44_100, "stereo"),
        ("a.ogg", "libopus", 48_000, "mono"),
        ("a.flac", "flac", 96_000, "stereo"),
    ],
)
def test_the_sound_is_copied_bit_for_bit(tmp_path, file, codec, rate, layout):
    """AAC in any case, other sound where that is wanted."""
    write_sound(tmp_path / file, codec, rate, layout)
    frames = (gray(i) for i in range(50))
    wanted = {} if codec == "aac" else {"audio_codec": "copy"}
    assert write_video(tmp_path / "out.mp4", frames, tmp_path / file, **wanted) == 50
    assert packets(tmp_path / "out.mp4") == packets(tmp_path / file)
    source, written = load_waveform(tmp_path / file), load_waveform(tmp_path / "out.mp4")
    assert 0 <= len(written) - len(source) < 0.03 * 16_000
    assert (written[: len(source)] - source)[:-200].abs().max() < 1e-3


@pytest.mark.parametrize(
    ("file", "codec", "rate", "layout", "as_rate", "as_layout"),
    [
        ("a.wav", "pcm_s16le", 8_000, "mono", 8_000, "mono"),
        ("b.wav", "pcm_f32le", 44_100, "stereo", 44_100, "stereo"),
        ("c.wav", "pcm_s24le", 48_000, "5.1", 48_000, "5.1"),
        ("d.wav", "pcm_s16le", 96_000, "mono", 48_000, "mono"),
        ("e.wav", "pcm_s16le", 192_000, "mono", 48_000, "mono"),
        ("f.wav", "pcm_s16le", 17_000, "mono", 22_050, "mono"),
        ("g.ogg", "vorbis", 44_100, "stereo", 44_100, "stereo"),
        ("h.ac3", "ac3", 48_000, "stereo", 48_000, "stereo"),
        ("i.mp3", "libmp3lame", 8_000, "mono", 8_000, "mono"),
        ("j.mp3", "libmp3lame", 44_100, "stereo", 44_100, "stereo"),
        ("k.m4a", "alac", 44_100, "stereo", 44_100, "stereo"),
        ("l.ogg", "libopus", 48_000, "mono", 48_000, "mono"),
        ("m.flac", "flac", 96_000, "5.1", 48_000, "5.1"),
    ],
)
def test_other_sound_becomes_aac_of_the_same_kind(tmp_path, file, codec, rate, layout, as_rate, as_layout):
    write_sound(tmp_path / file, codec, rate, layout)
    write_video(tmp_path / "out.mp4", (gray(i) for i in range(50)), tmp_path / file)
    with av.open(str(tmp_path / "out.mp4")) as container:
        sound = container.streams.audio[0].codec_context
        assert (sound.codec.name, sound.sample_rate, sound.layout.name) == ("aac", as_rate, as_layout)
    source, written = load_waveform(tmp_path / file), load_waveform(tmp_path / "out.mp4")
    assert 0 <= len(written) - len(source) < 0.15 * 16_000  # the last packet is filled up
    error = written[: len(source)] - source
    assert (error.square().mean() / source.square().mean()).sqrt() < 0.2


def test_bad_samples_do_not_stop_the_encoder(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=16_000, layout="mono")
        wave = 0.1 * np.sin(np.arange(16_000, dtype=np.float32)[None] / 8)
        wave[0, 5_000:6_000] = np.nan
        wave[0, 7_000] = np.inf
        frame = av.AudioFrame.from_ndarray(wave, format="flt", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert write_video(tmp_path / "out.mp4", (gray(i) for i in range(25)), tmp_path / "a.wav") == 25
    assert load_waveform(tmp_path / "out.mp4")[1_000:4_000].std() == pytest.approx(0.1 / 2**0.5, abs=0.01)


@pytest.mark.parametrize("suffix", ["wav", "m4a", "mp3", "flac", "webm"])
def test_flash_and_beep_stay_together(tmp_path, suffix):
    rate, at = 48_000, 30  # the flash is frame 30, the beep begins with it
    samples = np.zeros((1, 2 * rate), np.float32)
    samples[0, at * rate // 25 :][: rate // 10] = 0.5 * np.sin(2 * np.pi * 1_000 * np.arange(rate // 10) / rate)
    codec = {"wav": "pcm_s16le", "m4a": "aac", "mp3": "libmp3lame", "flac": "flac", "webm": "libopus"}[suffix]
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = (np.full((64, 64, 3), 255 * (index == at), np.uint8) for index in range(50))
    write_video(tmp_path / "out.mp4", frames, tmp_path / f"a.{suffix}")

    shown = list(read_frames(tmp_path / "out.mp4"))
    assert len(shown) == 50
    assert [index for index, frame in enumerate(shown) if frame.mean() > 128] == [at]
    loud = load_waveform(tmp_path / "out.mp4").abs() > 0.1
    assert int(loud.int().argmax()) == pytest.approx(at * 640, abs=40)
    # And by the time stamps themselves: the edit list puts both streams at 0.
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].start_time == 0
        assert abs(container.streams.audio[0].start_time) * container.streams.audio[0].time_base < 0.01


def test_sound_that_starts_late_stays_late(tmp_path):
    with av.open(str(tmp_path / "late.mkv"), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width = video.height = 64
        audio = container.add_stream("aac", rate=48_000, layout="mono")
        for index in range(50):
            container.mux(video.encode(av.VideoFrame.from_ndarray(gray(index))))
        container.mux(video.encode())
        beep = 0.5 * np.sin(2 * np.pi * 500 * np.arange(48_000) / 48_000).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(beep[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 36_000, Fraction(1, 48_000)  # at 0.75 s
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    write_video(tmp_path / "out.mp4", read_frames(tmp_path / "late.mkv"), tmp_path / "late.mkv")
    for name in ("late.mkv", "out.mp4"):
        loud = load_waveform(tmp_path / name).abs() > 0.1
        assert int(loud.int().argmax()) == pytest.approx(12_000, abs=50)


def test_a_browser_can_play_it(tmp_path):
    write_sound(tmp_path / "a.wav", "pcm_s16le", 44_100)
    write_video(tmp_path / "out.mp4", (gray(i) for i in range(50)), tmp_path / "a.wav")
    names = boxes((tmp_path / "out.mp4").read_bytes())
    assert names.index("moov") < names.index("mdat")
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 25)
        assert (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range) == (1, 1, 1, 1)
        assert (stream.frames, stream.duration * stream.time_base) == (50, 2)
        assert container.metadata["comment"] == f"AI-generated talking-head video made by dheads {__version__}"
        assert "AI-generated" in container.metadata["title"]
        assert container.metadata["encoder"] == f"dheads {__version__}"


def test_pixels_survive(tmp_path, shared):
    truth = list(read_frames(shared / "data" / "hdtf" / "RD_Radio2_000.mp4"))[:30]
    write_video(tmp_path / "out.mp4", truth, None)
    error = np.stack(list(read_frames(tmp_path / "out.mp4"))).astype(int) - np.stack(truth)
    assert error.shape == (30, 256, 256, 3)
    assert np.abs(error).mean() < 2.5
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 0.5  # no tint
    # Flat colours, far from gray: the matrix that is written is the one that is named.
    for colour in ((200, 40, 60), (30, 180, 90), (20, 60, 220)):
        write_video(tmp_path / "flat.mp4", [np.full((64, 64, 3), colour, np.uint8)] * 3, None)
        assert np.abs(frame_at(tmp_path / "flat.mp4").astype(int) - colour).max() <= 3


def test_frames_are_written_as_they_arrive(tmp_path):
    stream = io.BytesIO()
    written_before = []

    def frames() -> Iterator[np.ndarray]:
        for _ in range(400):
            written_before.append(stream.tell())
            yield np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

    write_sound(tmp_path / "a.m4a", "aac", 44_100, seconds=16)
    assert write_video(stream, frames(), tmp_path / "a.m4a") == 400
    assert written_before[-1] > 0.4 * len(stream.getvalue())
    (tmp_path / "out.mp4").write_bytes(stream.getvalue())
    assert boxes(stream.getvalue())[:3] == ["ftyp", "moov", "moof"]
    assert len(list(read_frames(tmp_path / "out.mp4"))) == 400
    source, written = load_waveform(tmp_path / "a.m4a")[:-200], load_waveform(tmp_path / "out.mp4")
    assert (written[: len(source)] - source).abs().max() < 1e-3


def test_a_closed_pipe_is_one_sentence():
    class Pipe(io.BytesIO):
        name = "<stdout>"

        def write(self, data: bytes) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with pytest.raises(DheadsError, match="cannot write <stdout>: Broken pipe"):
        write_video(Pipe(), itertools.repeat(noise, 300), None)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_when_the_frames_fail(tmp_path, error):
    def frames() -> Iterator[np.ndarray]:
        for index in range(60):
            if index == 50:
                assert len(list(tmp_path.iterdir())) == 2  # the work in progress is beside the sound
                raise error
            yield gray(index)

    write_sound(tmp_path / "a.wav", "pcm_s16le", 16_000)
    with pytest.raises(error):
        write_video(tmp_path / "out.mp4", frames(), tmp_path / "a.wav")
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_an_older_file_is_replaced_only_when_the_new_one_is_complete(tmp_path):
    target = tmp_path / "out.mp4"
    target.write_bytes(b"older")

    def frames(fail: bool) -> Iterator[np.ndarray]:
        yield gray(0)
        assert target.read_bytes() == b"older"
        if fail:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_video(target, frames(fail=True), None)
    assert target.read_bytes() == b"older"
    assert write_video(target, frames(fail=False), None) == 1
    assert len(list(read_frames(target))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_writers_side_by_side(tmp_path):
    """Each keeps to itself: one is closed, one discarded, one fails and takes its file with it."""
    write_sound(tmp_path / "a.m4a", "aac", 44_100)
    with (tmp_path / "a.m4a").open("rb") as stream:
        kept = video_writer(tmp_path / "kept.mp4", tmp_path / "a.m4a")
        given_up = video_writer(tmp_path / "given_up.mp4", stream)
        odd = video_writer(tmp_path / "odd.mp4", None)
        for index in range(50):
            kept.add(gray(index))
            given_up.add(gray(50 - index))
        assert {path.name for path in tmp_path.iterdir() if path.suffix != ".part"} == {"a.m4a"}
        with pytest.raises(DheadsError, match="63 x 64 px"):
            odd.add(np.zeros((64, 63, 3), np.uint8))
        assert len(list(tmp_path.iterdir())) == 3
        given_up.discard()
        kept.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.m4a", "kept.mp4"]
    assert kept.count == 50
    assert [number(frame) for frame in read_frames(tmp_path / "kept.mp4")] == list(range(50))
    assert packets(tmp_path / "kept.mp4") == packets(tmp_path / "a.m4a")
    with pytest.raises(DheadsError, match="no frame"):
        video_writer(tmp_path / "empty.mp4", None).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.m4a", "kept.mp4"]


def test_what_is_unfinished_can_be_removed_at_once(tmp_path):
    writer = video_writer(tmp_path / "o.mp4", None)
    writer.add(gray(0))
    assert len(list(tmp_path.iterdir())) == 1
    undo_all()
    assert list(tmp_path.iterdir()) == []
    writer.discard()


def test_a_streams_reader_gets_a_picture_every_second():
    stream = io.BytesIO()
    with video_writer(stream, None) as writer:
        written = [stream.tell() for index in range(60) if writer.add(gray(index)) is None]
    assert written[26] > 0
    assert written[52] > written[26]


def test_bad_targets_and_sounds_are_found_before_a_frame_is_asked_for(tmp_path):
    def frames() -> Iterator[np.ndarray]:
        pytest.fail("a frame was asked for")
        yield

    (tmp_path / "text.wav").write_text("this is no sound\n" * 50)
    write_pictures(tmp_path / "mute.mp4", [Fraction(0)])
    before = sorted(tmp_path.iterdir())
    for target, audio, said in [
        (tmp_path / "no" / "out.mp4", None, r"cannot write .*out\.mp4.*No such file"),
        (tmp_path / "text.wav" / "out.mp4", None, "cannot write"),
        (tmp_path, None, "it is a folder"),
        (tmp_path / "out.mp4", tmp_path / "missing.wav", "No such file"),
        (tmp_path / "out.mp4", tmp_path / "text.wav", "not a sound or video file"),
        (tmp_path / "out.mp4", tmp_path / "mute.mp4", "holds no sound stream"),
    ]:
        with pytest.raises(DheadsError, match=said):
            write_video(target, frames(), audio)
    with pytest.raises(DheadsError, match="no frame"):
        write_video(tmp_path / "out.mp4", [], None)
    with pytest.raises(DheadsError, match="63 x 64 px"):
        write_video(tmp_path / "out.mp4", [np.zeros((64, 63, 3), np.uint8)], None)
    assert sorted(tmp_path.iterdir()) == before


def test_a_prepared_clip_keeps_pixels_and_samples(tmp_path, shared):
    source = shared / "data" / "talkvid" / "Age_19-30_1.mp4"
    frames = list(itertools.islice(read_frames(source), 50))
    waveform = load_waveform(source)[:32_000]
    assert write_clip(tmp_path / "clip.mp4", frames, waveform) == 50
    assert (load_waveform(tmp_path / "clip.mp4") - waveform).abs().max() <= 0.5 / 32_768 + 1e-7
    error = np.stack(list(read_frames(tmp_path / "clip.mp4"))).astype(int) - np.stack(frames)
    assert np.abs(error).mean() < 2
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert all(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
        assert container.streams.video[0].frames == 50


def test_decoded_frames_are_encoded_without_a_change_of_colours(tmp_path: Path, shared: Path) -> None:
    source = shared / "data" / "talkvid" / "Age_19-30_1.mp4"
    write_clip(tmp_path / "clip.mp4", itertools.islice(read_frames(source), 30), torch.zeros(30 * 640))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = list(container.decode(video=0))
    planes = [frame.to_ndarray() for frame in frames]  # YUV 4:2:0
    assert write_clip(tmp_path / "same.mp4", frames, torch.zeros(30 * 640), x264_options={"qp": "0"}) == 30
    with av.open(str(tmp_path / "same.mp4")) as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    with av.open(str(tmp_path / "same.mp4")) as container:
        same = list(container.decode(video=0))
    assert keys == [True] + 29 * [False]  # the encoder's choice, though every frame was one
    assert [frame.time for frame in same] == [pytest.approx(k / 25) for k in range(30)]
    assert np.array_equal([frame.to_ndarray() for frame in same], planes)


@pytest.mark.parametrize("samples", [640, 16_000, 47_999])
def test_opus_begins_at_its_time_and_lasts_as_long(tmp_path: Path, samples: int) -> None:
    rng = np.random.default_rng(0)
    waveform = torch.zeros(samples)
    click = samples // 2
    waveform[click : click + 100] = torch.from_numpy(rng.uniform(-0.5, 0.5, 100).astype(np.float32))
    write_clip(tmp_path / "clip.mp4", [gray(0)], waveform, opus_kbps=64)
    heard = load_waveform(tmp_path / "clip.mp4")
    assert abs(len(heard) - samples) <= 1
    lags = range(-16, 17)
    matches = [float(heard.roll(-lag)[: samples - 1] @ waveform[: samples - 1]) for lag in lags]
    assert lags[int(np.argmax(matches))] == 0


def float_wav(path: Path, samples: np.ndarray) -> None:
    """32-bit float samples (N, channels) at 16 kHz, its channels without names."""
    data = samples.astype("<f4").tobytes()
    channels = samples.shape[1]
    form = struct.pack("<HHIIHH", 3, channels, 16_000, 64_000 * channels, 4 * channels, 32)
    chunks = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks)


@pytest.mark.parametrize("channels", [7, 9, 64])
def test_sound_of_channels_that_aac_has_no_names_for_becomes_mono(tmp_path: Path, channels: int) -> None:
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    float_wav(tmp_path / "a.wav", np.repeat(tone[:, None], channels, axis=1))
    write_video(tmp_path / "a.mp4", [np.zeros((32, 32, 3), np.uint8)] * 25, tmp_path / "a.wav")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.audio[0].codec_context.layout.nb_channels == 1
    heard = load_waveform(tmp_path / "a.mp4").numpy()[2000:14_000]
    assert heard.std() == pytest.approx(0.3 / 2**0.5, rel=0.05)


def test_samples_beyond_full_scale_are_clipped(tmp_path: Path) -> None:
    samples = np.zeros((16_000, 1))
    samples[8000:] = 1e38
    float_wav(tmp_path / "a.wav", samples)
    write_video(tmp_path / "a.mp4", [np.zeros((32, 32, 3), np.uint8)] * 25, tmp_path / "a.wav")
    assert abs(load_waveform(tmp_path / "a.mp4")).max() <= 1.6  # AAC overshoots
