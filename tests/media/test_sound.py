"""Reading sound: every format gives the same waveform, and time 0 is that of the picture."""

from __future__ import annotations

import io
import math
import struct
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torchaudio.functional as AF

from dheads.errors import DheadsError
from dheads.media import containers as media
from dheads.media.hearing import hear
from dheads.media.sound import claimed_seconds, delayed, frame_count, load_waveform, wav_file, waveform_pieces


def speechlike(seconds: float, rate: int = 16_000) -> np.ndarray:
    """(N,) float32: harmonics of a gliding voice, in syllables; nothing above 3 kHz."""
    return _speechlike(seconds, rate).copy()


@cache
def _speechlike(seconds: float, rate: int) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * (110 * t + 15 * np.sin(2 * np.pi * 0.7 * t))
    voice = sum(np.sin(n * phase) / n for n in range(1, 18))
    return (0.15 * voice * np.sin(np.pi * 3.3 * t) ** 2).astype(np.float32)


def write_sound(
    path: Path, samples: np.ndarray, rate: int, codec: str, layout: str = "mono", start: float = 0.0, **metadata: str
) -> None:
    """Encode (N,) or (channels, N) float samples into the container that the suffix names."""
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata)
        stream = container.add_stream(codec, rate=rate, layout=layout, options={"strict": "-2"})
        planes = np.broadcast_to(samples, (stream.layout.nb_channels, samples.shape[-1])).astype(np.float32)
        for begin in range(0, planes.shape[1], 1000):
            part = np.ascontiguousarray(planes[:, begin : begin + 1000])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, begin + round(start * rate), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_wav(path: Path, data: np.ndarray, rate: int, kind: int = 1) -> None:
    """A WAV file of (N, channels) samples just as they are; kind 1 is integer, 3 is floating point."""
    channels, width, raw = data.shape[1], data.dtype.itemsize, data.tobytes()
    head = struct.pack(
        "<4sIHHIIHH", b"fmt ", 16, kind, channels, rate, rate * channels * width, channels * width, width * 8
    )
    body = head + struct.pack("<4sI", b"data", len(raw)) + raw
    path.write_bytes(struct.pack("<4sI4s", b"RIFF", len(body) + 4, b"WAVE") + body)


def lag(reference: np.ndarray, other: np.ndarray) -> int:
    """By how many samples `other` comes later than `reference`, by cross-correlation."""
    size = 1 << (len(reference) + len(other)).bit_length()  # a power of two is fast
    product = np.fft.irfft(np.fft.rfft(other, size) * np.fft.rfft(reference, size).conj(), size)
    best = int(product.argmax())
    return best - size if best > size // 2 else best


@pytest.mark.parametrize(
    ("file", "rate", "codec", "layout"),
    [
        ("a.m4a", 44_100, "aac", "mono"),
        ("a.mp4", 48_000, "aac", "5.1"),
        ("a.mp3", 44_100, "libmp3lame", "mono"),
        ("b.mp3", 22_050, "libmp3lame", "stereo"),
        ("a.ogg", 44_100, "vorbis", "stereo"),
        ("b.ogg", 48_000, "libopus", "mono"),
        ("a.webm", 48_000, "libopus", "stereo"),
        ("a.flac", 96_000, "flac", "stereo"),
        ("b.m4a", 44_100, "alac", "stereo"),
        ("a.mkv", 44_100, "aac", "mono"),
        ("a.wav", 8_000, "pcm_s16le", "mono"),
        ("b.wav", 48_000, "pcm_s24le", "5.1"),
        ("c.wav", 44_101, "pcm_f32le", "mono"),
        ("a.mov", 44_100, "pcm_s16be", "stereo"),
    ],
)
def test_every_codec_rate_and_layout_gives_the_same_sound_at_the_same_time(tmp_path, file, rate, codec, layout):
    write_sound(tmp_path / file, speechlike(1.6, rate), rate, codec, layout)
    sound, truth = load_waveform(tmp_path / file), speechlike(1.6)
    assert sound.dtype == torch.float32
    assert sound.dim() == 1
    assert 0 <= len(sound) - len(truth) < 0.03 * 16_000  # codecs fill their last packet
    assert lag(truth, sound.numpy()) == 0
    error = sound[: len(truth)].numpy() - truth
    assert np.sqrt((error**2).mean() / (truth**2).mean()) < 0.2


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (1, np.array([0, 64, 128, 192, 255], np.uint8)),
        (1, np.array([-32768, -16384, 0, 16384, 32512], np.int16)),
        (1, np.array([-(2**31), -(2**30), 0, 2**30, 127 * 2**24], np.int32)),
        (3, np.array([-1, -0.5, 0, 0.5, 127 / 128], np.float32)),
        (3, np.array([-1, -0.5, 0, 0.5, 127 / 128], np.float64)),
    ],
)
def test_sample_formats_have_one_scale(tmp_path, kind, data):
    write_wav(tmp_path / "a.wav", data[:, None], 16_000, kind)
    assert load_waveform(tmp_path / "a.wav").tolist() == [-1, -0.5, 0, 0.5, 127 / 128]


def test_a_waveform_written_as_wav_reads_as_it_was():
    waveform = torch.from_numpy(speechlike(0.5))
    torch.testing.assert_close(load_waveform(wav_file(waveform)), waveform, atol=2 / 32767, rtol=0)
    loud = load_waveform(wav_file(torch.tensor([2.0, -2.0])))
    torch.testing.assert_close(loud, torch.tensor([1.0, -1.0]), atol=1e-4, rtol=0)


def test_mono_is_the_mean_of_the_channels(tmp_path):
    levels = np.array([0.1, 0.2, 0.3, -0.4, 0.5, 0.5], np.float32)
    write_wav(tmp_path / "a.wav", np.tile(levels, (800, 1)), 16_000, 3)
    assert load_waveform(tmp_path / "a.wav").numpy() == pytest.approx(0.2, abs=1e-6)


def test_bad_samples_are_silence_and_loud_ones_are_clipped(tmp_path):
    data = np.array([0.25, math.nan, math.inf, -math.inf, 3.0, -3.0], np.float32)
    write_wav(tmp_path / "a.wav", data[:, None], 16_000, 3)
    assert load_waveform(tmp_path / "a.wav").tolist() == [0.25, 0, 0, 0, 1, -1]


@pytest.mark.parametrize("file", ["late.mkv", "late.mp4", "late.ts"])
def test_sound_that_starts_after_the_picture_is_preceded_by_silence(tmp_path, file):
    with av.open(str(tmp_path / file), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width = video.height = 64
        audio = container.add_stream("flac" if file.endswith("mkv") else "mp3", rate=48_000, layout="mono")
        offset = 10.0 if file.endswith("ts") else 0.0  # where the container's own clock begins
        for index in range(40):
            picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))
            picture.pts = index + round(offset * 25)
            container.mux(video.encode(picture))
        container.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(speechlike(1.0, 48_000)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, round((0.6 + offset) * 48_000), Fraction(1, 48_000)
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    sound = load_waveform(tmp_path / file).numpy()
    truth = np.concatenate([np.zeros(9_600, np.float32), speechlike(1.0)])
    assert abs(lag(truth, sound)) <= 16
    assert np.abs(sound[:9_000]).max() < 1e-3


def test_a_gap_between_time_stamps_is_silence(tmp_path):
    samples = speechlike(2.0, 48_000)
    with av.open(str(tmp_path / "gap.mkv"), "w") as container:
        stream = container.add_stream("flac", rate=48_000, layout="mono")
        for begin, shift in ((0, 0), (48_000, 24_000)):
            part = np.ascontiguousarray(samples[None, begin : begin + 48_000])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48_000, begin + shift, Fraction(1, 48_000)
            for packet in stream.encode(frame):
                container.mux(packet)
        container.mux(stream.encode())
    sound = load_waveform(tmp_path / "gap.mkv").numpy()
    assert len(sound) == pytest.approx(2.5 * 16_000, abs=2_000)
    assert lag(speechlike(2.0)[17_600:], sound[25_600:]) == pytest.approx(0, abs=16)


def test_what_fills_the_last_packet_up_is_no_sound(tmp_path):
    write_sound(tmp_path / "a.m4a", speechlike(2, 8_000), 8_000, "aac", "mono")
    assert len(load_waveform(tmp_path / "a.m4a")) == 2 * 16_000


def test_a_stream_reads_like_a_file_and_from_its_beginning(tmp_path):
    write_sound(tmp_path / "a.ogg", speechlike(1.0, 48_000), 48_000, "libopus")
    stream = io.BytesIO((tmp_path / "a.ogg").read_bytes())
    first, second = load_waveform(stream), load_waveform(stream)
    assert torch.equal(first, second)
    assert torch.equal(first, load_waveform(tmp_path / "a.ogg"))


def test_a_file_cut_short_gives_what_it_holds(tmp_path):
    write_sound(tmp_path / "a.mp3", speechlike(3.0, 44_100), 44_100, "libmp3lame")
    whole = load_waveform(tmp_path / "a.mp3")
    data = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(data[: len(data) // 2])
    half = load_waveform(tmp_path / "cut.mp3")
    assert 0.4 * len(whole) < len(half) < 0.6 * len(whole)
    assert (half[:16_000] - whole[:16_000]).abs().max() < 1e-4


@pytest.mark.parametrize(("file", "codec"), [("a.m4a", "aac"), ("a.ts", "aac"), ("a.ogg", "libopus")])
def test_damaged_packets_leave_the_rest_in_step(tmp_path, file, codec):
    write_sound(tmp_path / file, speechlike(4.0, 48_000), 48_000, codec)
    whole = load_waveform(tmp_path / file).numpy()
    data = bytearray((tmp_path / file).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 600] = bytes(600)
    (tmp_path / file).write_bytes(data)
    damaged = load_waveform(tmp_path / file).numpy()
    assert len(damaged) == len(whole)
    assert np.array_equal(damaged[:14_000], whole[:14_000])
    assert np.abs(damaged[-12_000:] - whole[-12_000:]).max() < 0.02
    assert np.abs(damaged - whole).max() > 0.05  # the damage has an effect


def test_tags_in_another_encoding_do_no_harm(tmp_path):
    write_sound(tmp_path / "a.mp3", speechlike(0.5, 44_100), 44_100, "libmp3lame", title="Muller")
    data = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "b.mp3").write_bytes(data.replace(b"\x03Muller", b"\x03M\xfcller"))
    assert len(load_waveform(tmp_path / "b.mp3")) == len(load_waveform(tmp_path / "a.mp3"))


def test_real_recordings(shared):
    durations = {"speech_de.wav": 8.89977, "speech_nl.wav": 8.50059, "speech_en_jfk.flac": 11.0}
    for name, seconds in durations.items():
        sound = load_waveform(shared / "samples" / name)
        assert len(sound) == pytest.approx(seconds * 16_000, abs=2)
        assert 0.01 < sound.square().mean().sqrt() < 0.3
    clip = load_waveform(shared / "data" / "hdtf" / "RD_Radio2_000.mp4")
    assert len(clip) == 129_024  # 126 packets of 1024 samples


def test_unusable_sound_is_one_sentence(tmp_path):
    (tmp_path / "text.wav").write_text("this is no sound\n" * 50)
    (tmp_path / "empty.wav").write_bytes(b"")
    write_wav(tmp_path / "none.wav", np.zeros((0, 1), np.int16), 16_000)
    write_wav(tmp_path / "fast.wav", np.zeros((100, 1), np.int16), 2_000_000)
    with av.open(str(tmp_path / "mute.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        container.mux(stream.encode())
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path / 'none.wav'}\n#EXT-X-ENDLIST\n")
    for name, said in {
        "missing.wav": "No such file",
        ".": "cannot read",
        "text.wav": "not a sound or video file",
        "empty.wav": "not a sound or video file",
        "none.wav": "holds no sound",
        "fast.wav": "2000000 sound samples a second",
        "mute.mp4": "holds no sound stream",
        "list.m3u8": "list.m3u8",
    }.items():
        with pytest.raises(DheadsError, match=said) as raised:
            load_waveform(tmp_path / name)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_long_sound_comes_in_pieces(tmp_path, rate, monkeypatch):
    """The pieces equal the whole resampled at once, and the file is read no further than each piece needs."""
    sound = np.tile(speechlike(10.0, rate) * 8, 15)[: 150 * rate]  # in part too loud
    write_wav(tmp_path / "a.wav", (sound.clip(-1, 1) * 32767).astype(np.int16)[:, None], rate)
    positions = []
    read = media._samples
    monkeypatch.setattr(media, "_samples", lambda frame: positions.append(frame.time) or read(frame))
    pieces = []
    for piece in waveform_pieces(tmp_path / "a.wav"):
        pieces.append(piece)
        assert len(piece) < 62 * 16_000
        assert positions[-1] < len(pieces) * 61
    assert len(pieces) == 3
    waveform = torch.cat(pieces)
    assert torch.equal(waveform, load_waveform(tmp_path / "a.wav"))
    truth = AF.resample(torch.from_numpy(sound.clip(-1, 1)), rate, 16_000).clamp(-1, 1)
    assert waveform.shape == truth.shape
    assert (waveform - truth).abs().max() < 1e-3


def test_too_much_sound_is_found_on_the_way(tmp_path, monkeypatch):
    write_wav(tmp_path / "a.wav", np.tile(speechlike(10.0), 7)[:, None], 16_000, 3)
    monkeypatch.setattr(media, "MAX_SECONDS", 65)
    pieces = waveform_pieces(tmp_path / "a.wav")
    assert len(next(pieces)) == pytest.approx(60 * 16_000, abs=16_000)
    with pytest.raises(DheadsError, match=r"a\.wav holds more than 0 hours of sound; cut it"):
        next(pieces)


def test_containers_claim_a_length(tmp_path, shared):
    def claimed(path: Path) -> float | None:
        return claimed_seconds(path, hear(path))

    assert claimed(shared / "samples" / "speech_en_jfk.flac") == 11.0
    write_sound(tmp_path / "a.mkv", speechlike(1.0, 48_000), 48_000, "flac")
    assert claimed(tmp_path / "a.mkv") == pytest.approx(1.0, abs=0.03)
    clip = shared / "data" / "hdtf" / "RD_Radio2_000.mp4"
    assert claimed(clip) == pytest.approx(len(load_waveform(clip)) / 16_000, abs=0.1)


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(0, 1), (1, 1), (640, 1), (959, 1), (961, 2), (16_000, 25), (16_321, 26), (57_600_000, 90_000)],
)
def test_frame_count(samples, frames):
    assert frame_count(samples) == frames


def test_the_resampler_is_torchaudios(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000).astype(np.float32) * 0.5
    write_wav(tmp_path / "a.wav", tone[:, None], 48_000, 3)
    spectrum = torch.fft.rfft(load_waveform(tmp_path / "a.wav")).abs()
    assert spectrum.argmax() == 440
    truth = AF.resample(torch.from_numpy(tone), 48_000, 16_000)
    assert torch.equal(load_waveform(tmp_path / "a.wav"), truth)


def test_delayed_sound_is_as_long_and_silent_where_it_lacks():
    sound = torch.arange(1.0, 641.0)
    assert torch.equal(delayed(sound, 0.01), torch.cat([torch.zeros(160), sound[:480]]))
    assert torch.equal(delayed(sound, -0.01), torch.cat([sound[160:], torch.zeros(160)]))
    assert torch.equal(delayed(sound, 1), torch.zeros(640))
