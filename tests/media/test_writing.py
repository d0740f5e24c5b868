"""Written videos: picture and sound in step, complete or absent."""

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
from videos import boxes, gray, number, packets, write_pictures, write_sound

from dheads import __version__
from dheads.errors import DheadsError
from dheads.media.reading import frame_at, read_frames
from dheads.media.sound import load_waveform
from dheads.media.writing import video_writer, write_clip, write_video
from dheads.system.signals import undo_all


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
    """AAC in any case, other sound if a copy is requested."""
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
    assert 0 <= len(written) - len(source) < 0.15 * 16_000  # the last packet is padded
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
    # Flat colours, far from gray: the stated matrix is the one that is used.
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
                assert len(list(tmp_path.iterdir())) == 2  # the unfinished file is in the same folder as the sound
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
    """Writers are independent: one is closed, one discarded, one fails and removes its file."""
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


def test_unfinished_files_can_be_removed_at_once(tmp_path):
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


def test_bad_targets_and_sounds_are_found_before_the_first_frame(tmp_path):
    def frames() -> Iterator[np.ndarray]:
        pytest.fail("a frame was taken")
        yield

    (tmp_path / "text.wav").write_text("this is no sound\n" * 50)
    write_pictures(tmp_path / "mute.mp4", [Fraction(0)])
    before = sorted(tmp_path.iterdir())
    for target, audio, message in [
        (tmp_path / "no" / "out.mp4", None, r"cannot write .*out\.mp4.*No such file"),
        (tmp_path / "text.wav" / "out.mp4", None, "cannot write"),
        (tmp_path, None, "it is a folder"),
        (tmp_path / "out.mp4", tmp_path / "missing.wav", "No such file"),
        (tmp_path / "out.mp4", tmp_path / "text.wav", "not a sound or video file"),
        (tmp_path / "out.mp4", tmp_path / "mute.mp4", "holds no sound stream"),
    ]:
        with pytest.raises(DheadsError, match=message):
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
    assert keys == [True] + 29 * [False]  # the encoder's choice, though every source frame is one
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
    """A WAV file of samples (N, channels) float32 at 16 kHz, with unnamed channels."""
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
