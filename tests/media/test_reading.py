"""Frames of any video at 25 fps."""

from __future__ import annotations

import itertools
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from videos import gray, number, write_pictures, write_sound

from dheads.errors import DheadsError
from dheads.media.reading import frame_at, read_frames


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
        assert 0 < np.median(steps) < 10  # it moves, in order


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
    for name, message in {
        "missing.mp4": "No such file",
        "text.mp4": "not a video or sound file",
        "sound.wav": "holds no video stream",
        "jump.mkv": "time stamps are damaged",
    }.items():
        with pytest.raises(DheadsError, match=message) as raised:
            list(read_frames(tmp_path / name))
        assert name in str(raised.value)
        assert "\n" not in str(raised.value)
