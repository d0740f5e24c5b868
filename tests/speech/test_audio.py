"""Sound of every kind to a waveform in step with time 0, and speech embeddings that know where they are."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torchaudio
import torchaudio.functional as AF

from dheads.errors import DheadsError
from dheads.media import containers as media
from dheads.media.hearing import hear
from dheads.media.sound import claimed_seconds, frame_count, load_waveform, wav_file, waveform_pieces
from dheads.speech import bundles
from dheads.speech.bundles import BundleEncoder
from dheads.speech.encoders import load_speech_encoder
from dheads.speech.interface import SpeechEncoder
from dheads.speech.released import ReleasedEncoder
from dheads.speech.whisper import WhisperEncoder


def speechlike(seconds: float, rate: int = 16_000) -> np.ndarray:
    """(N,) float32: harmonics of a gliding voice, in syllables; nothing above 3 kHz."""
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
    size = len(reference) + len(other)
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
    assert np.abs(damaged - whole).max() > 0.05  # it was really damaged


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
    """As if resampled at once, though the file is read no further than the piece."""
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


# --- Speech encoder --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whisper() -> WhisperEncoder:
    return load_speech_encoder("whisper-tiny.en")


def test_the_packaged_encoder_is_frozen(whisper):
    assert (whisper.name, whisper.dim) == ("whisper-tiny.en", 384)
    assert not whisper.training
    assert not any(parameter.requires_grad for parameter in whisper.parameters())


def test_an_unknown_encoder_lists_the_known_ones():
    known = r"diffused-heads, hubert-base, wav2vec2-base, whisper-tiny\.en"
    with pytest.raises(DheadsError, match=f"'hubert'.*{known}"):
        load_speech_encoder("hubert")


def test_mel_filters_are_slaneys(whisper):
    # M. Slaney's Auditory Toolbox: linear below 1 kHz, logarithmic above; triangles of equal area.
    def to_hz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    top = 15 + 27 * np.log(8) / np.log(6.4)
    edges = to_hz(np.linspace(0, top, 82))
    hz = np.linspace(0, 8000, 201)[:, None]
    rise = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    filters = np.clip(np.minimum(rise, fall), 0, None) * 2 / (edges[2:] - edges[:-2])
    assert np.abs(whisper.mel_filters.numpy() - filters).max() < 1e-6


def test_golden_values_of_openais_own_code(whisper):
    # openai-whisper 20250625: mel filters, Conv1d, blocks and positions, run on the two seconds around each frame.
    t = torch.arange(48_000, dtype=torch.float64) / 16_000
    voice = 0.3 * torch.sin(2 * torch.pi * (120 + 40 * t) * t) * (1 + torch.sin(2 * torch.pi * 3 * t)) / 2
    beeps = 0.1 * torch.sin(2 * torch.pi * 1700 * t) * (t % 0.5 < 0.2)
    embeddings = whisper.encode((voice + beeps).float())
    assert embeddings.shape == (75, 384)
    golden = {
        0: ([1.3126, -1.715, 0.6261, -1.4778], 24.5788),
        37: ([-0.1277, -0.5834, 0.0926, -1.0388], 20.7874),
        74: ([0.8125, -1.524, -0.6145, -0.8308], 19.1169),
    }
    for frame, (first, norm) in golden.items():
        assert embeddings[frame, :4].tolist() == pytest.approx(first, abs=1e-3)
        assert embeddings[frame].norm().item() == pytest.approx(norm, abs=1e-3)


def test_embeddings_of_speech(whisper, shared):
    sound = load_waveform(shared / "samples" / "speech_en_jfk.flac")[:48_000]
    speech = whisper.encode(sound)
    assert 0.7 < speech.std() < 1.3  # about unit scale
    assert abs(speech.mean()) < 0.2
    silence = whisper.encode(torch.zeros(640), frames=1)
    assert (speech - silence).norm(dim=1).min() > 5
    # Loudness hardly matters, what is said does.
    quieter = whisper.encode(sound[:32_000] * 0.25)[:25]
    assert (quieter - speech[:25]).norm(dim=1).mean() < 0.5 * (speech[20:45] - speech[:25]).norm(dim=1).mean()
    # Shifting the sound by k frames shifts the embeddings by k frames.
    shifted = whisper.encode(torch.nn.functional.pad(sound[:24_000], (7 * 640, 0)), frames=25)
    assert (shifted[7:] - whisper.encode(sound[:24_000], frames=18)).abs().max() < 1e-3


# What follows is due to the windows and not to the weights: a small encoder of the same build shows it sooner.


@pytest.fixture(scope="module")
def small() -> WhisperEncoder:
    torch.manual_seed(0)
    return WhisperEncoder(blocks=1).eval()


def test_pieces_of_speech_give_the_embeddings_of_the_whole(whisper, shared):
    sound = load_waveform(shared / "samples" / "speech_es.wav")[:60_001]
    chunks = list(whisper.encode_pieces(sound.split(7_000)))
    assert [len(chunk) for chunk in chunks] == [32, 32, 30]
    assert (torch.cat(chunks) - whisper.encode(sound)).abs().max() < 1e-6


def test_shifting_the_sound_shifts_the_embeddings(small, shared):
    sound = load_waveform(shared / "samples" / "speech_nl.wav")[16_000:64_000]  # begins amid speech
    embeddings = small.encode(sound)
    for k in (1, 7, 40):
        shifted = small.encode(torch.nn.functional.pad(sound, (k * 640, 0)))
        assert (shifted[k:] - embeddings).abs().max() < 1e-4
    earlier = small.encode(sound[10 * 640 :])
    assert (earlier[25:] - embeddings[35:]).abs().max() < 1e-4


def test_sound_of_any_length(small, shared):
    sound = load_waveform(shared / "samples" / "speech_de.wav")[:32_000]
    for samples in (1, 300, 1_600, 16_000):
        assert small.encode(sound[:samples]).shape == (frame_count(samples), 384)
    # 45 s, longer than the 30 s that Whisper was made for: a phrase is heard alike wherever it comes.
    embeddings = small.encode(torch.nn.functional.pad(sound, (0, 16_000)).repeat(15))
    assert embeddings.shape == (1_125, 384)
    phrases = embeddings.unflatten(0, (15, 75))
    assert (phrases[1:-1] - phrases[1]).abs().max() < 1e-4
    assert (phrases[0, 25:] - phrases[1, 25:]).abs().max() < 1e-4
    assert (phrases[14, :50] - phrases[1, :50]).abs().max() < 1e-4
    assert (phrases[1, :50] - small.encode(sound)).abs()[25:].max() < 1e-4


def test_an_embedding_knows_one_second_either_side_only(small, shared):
    sound = load_waveform(shared / "samples" / "speech_fr.wav")[:96_000]
    changed = sound.clone()
    changed[48_000:] = 0.9 * torch.rand(48_000) - 0.45  # loud noise from frame 75 on
    difference = (small.encode(sound) - small.encode(changed)).abs().amax(dim=1)
    assert difference[:49].max() < 1e-5
    assert difference[52:].min() > 1e-4


def test_an_embedding_is_centred_on_its_frame(whisper):
    click = torch.zeros(20 * 640)
    click[10 * 640 + 320] = 0.5
    difference = (whisper.encode(click) - whisper.encode(torch.zeros_like(click))).abs().mean(dim=1)
    assert difference.argmax() == 10
    assert difference[9].item() == pytest.approx(difference[11].item(), rel=0.3)


def test_embeddings_do_not_depend_on_the_batch(small, shared, monkeypatch):
    sound = load_waveform(shared / "samples" / "speech_es.wav")[:40_000]
    embeddings = small.encode(sound)
    monkeypatch.setattr(small, "batch", 5)
    assert (small.encode(sound) - embeddings).abs().max() < 1e-4


def test_other_tempos_are_other_voices_in_step_with_the_frames(whisper, shared):
    """Each frame hears its own moment: the embeddings are nearer to that frame's than to others'."""
    sound = load_waveform(shared / "samples" / "speech_es.wav")[16_000 : 16_000 + 100 * 640]
    plain = whisper.encode(sound, 100)
    assert (whisper.encode_at(1.0, sound, 100) - plain).abs().max() < 1e-3
    for tempo in (0.85, 1.18):
        voice = whisper.encode_at(tempo, sound, 100)
        assert voice.shape == (100, 384)
        own, late, early = ((voice[10:-10] - plain.roll(shift, 0)[10:-10]).norm(dim=1).mean() for shift in (0, 3, -3))
        assert 1 < own < 0.8 * min(late, early)


def test_frames_may_be_asked_for(small):
    sound = torch.from_numpy(speechlike(1.0))
    own = small.encode(sound)
    assert own.shape == (25, 384)
    longer = small.encode(sound, frames=30)
    assert longer.shape == (30, 384)
    assert (longer[:25] - own).abs().max() < 1e-4
    assert (small.encode(sound, frames=20) - own[:20]).abs().max() < 1e-4


def test_the_resampler_is_torchaudios(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000).astype(np.float32) * 0.5
    write_wav(tmp_path / "a.wav", tone[:, None], 48_000, 3)
    spectrum = torch.fft.rfft(load_waveform(tmp_path / "a.wav")).abs()
    assert spectrum.argmax() == 440
    truth = AF.resample(torch.from_numpy(tone), 48_000, 16_000)
    assert torch.equal(load_waveform(tmp_path / "a.wav"), truth)


# --- The authors' encoder: what it is called with


class Recorder(torch.nn.Module):
    """Returns a summary of its inputs: first and last sample, sum, length, and the number of earlier calls."""

    def forward(self, window, lengths, init_state):
        assert window.shape == (1, 1, 3200)
        assert init_state.shape == (2, 1, 256)
        embedding = torch.zeros(1, 256)
        inputs = (window[0, 0, 0], window[0, 0, -1], window.sum(), lengths[0], init_state[0, 0, 0])
        embedding[0, :5] = torch.stack([torch.as_tensor(value).float() for value in inputs])
        return embedding, lengths, init_state + 1


@pytest.mark.parametrize(("samples", "frames"), [(6_400, 10), (6_400 + 319, 10), (6_400 + 321, 11), (100, 1)])
def test_the_released_encoder_hears_five_frames_around_each(samples, frames):
    sound = torch.arange(1.0, samples + 1)
    embeddings = ReleasedEncoder(Recorder()).encode(sound)
    assert (embeddings.shape, embeddings.dtype) == ((frames, 256), torch.float32)
    padded = torch.zeros(samples + 20_000)
    padded[1_280 : 1_280 + samples] = sound
    for k in range(frames):
        window = padded[640 * k : 640 * k + 3_200]  # samples 640 k - 1280 to 640 k + 1920 of the sound
        expected = [window[0].item(), window[-1].item(), window.sum().item(), 3_200, k]
        assert embeddings[k, :5].tolist() == pytest.approx(expected)


def test_the_released_encoder_gives_as_many_frames_as_asked_for():
    encoder = ReleasedEncoder(Recorder())
    own = encoder.encode(torch.ones(6_400))
    assert torch.equal(encoder.encode(torch.ones(6_400), 7), own[:7])
    longer = encoder.encode(torch.ones(6_400), 15)
    assert torch.equal(longer[:10], own)
    assert longer[13, 2] == 0  # silence after the end
    assert torch.equal(encoder.encode(torch.ones(64_000), 7), own[:7])
    assert torch.equal(encoder.encode(torch.ones(64_000), 60)[:50], encoder.encode(torch.ones(64_000))[:50])
    assert torch.equal(encoder.encode(torch.ones(6_400)), own)  # nothing is left of the recording before


# --- torchaudio's bundles, by a small stand-in of the same build


SMALL = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(16, 10, 5), *[(16, 3, 2)] * 4, *[(16, 2, 2)] * 2],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 24,
    "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 7,
    "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_features": 32,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.1,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.05,
    "aux_num_out": None,
}


@pytest.fixture
def bundle(monkeypatch, tmp_path) -> Path:
    """A bundle in place of HuBERT, whose file lies in the cache already."""
    torch.manual_seed(0)
    small = torchaudio.pipelines.Wav2Vec2Bundle("small.pth", SMALL, 16_000, False, _model_type="Wav2Vec2")
    monkeypatch.setattr(bundles, "BUNDLES", {"hubert-base": small})
    monkeypatch.setenv("DHEADS_HOME", str(tmp_path))
    torch.save(torchaudio.models.wav2vec2_model(**SMALL).state_dict(), tmp_path / "small.pth")
    return tmp_path / "small.pth"


def test_a_bundle_gives_one_embedding_a_frame(bundle):
    encoder = load_speech_encoder("hubert-base")
    assert not encoder.training
    assert encoder.name == "hubert-base"
    sound = torch.from_numpy(speechlike(1.5))
    embeddings = encoder.encode(sound)
    assert (embeddings.shape, embeddings.dtype) == ((38, 24), torch.float32)
    # The sixth block's output; two columns a frame, in step with the frame's middle.
    columns = encoder.model.extract_features(torch.nn.functional.pad(sound, (40, 360))[None])[0][5][0]
    torch.testing.assert_close(embeddings[:37], columns[:74].unflatten(0, (37, 2)).mean(dim=1), rtol=0, atol=2e-2)
    assert encoder.encode(sound[:100]).shape == (1, 24)
    assert encoder.encode(sound, frames=3).shape == (3, 24)
    assert encoder.encode(sound, frames=50).shape == (50, 24)


def test_a_bundles_embedding_is_centred_on_its_frame():
    class Middle(torch.nn.Module):
        """In place of the model: where each output's samples lie, in the sound itself."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def extract_features(self, waveforms, num_layers):
            assert num_layers == 6
            middles = waveforms.unfold(1, 400, 320).mean(dim=2)
            return [middles[..., None].expand(-1, -1, 4)], None

    encoder = BundleEncoder("middle", Middle())
    sound = torch.arange(640.0 * 1_000)  # a sample's value is its place
    embeddings = encoder.encode(sound)
    middles = 640.0 * torch.arange(1_000) + 319.5
    torch.testing.assert_close(embeddings[1:-1, 0], middles[1:-1], rtol=0, atol=0.5)


def test_long_sound_is_encoded_in_overlapping_parts(bundle):
    encoder = load_speech_encoder("hubert-base")
    sound = torch.from_numpy(speechlike(4.0))
    whole = encoder.encode(sound)
    encoder.chunk, encoder.margin = 30, 20
    parts = encoder.encode(sound)
    assert parts.shape == whole.shape
    assert (parts - whole).norm(dim=1).mean() < 0.2 * whole.std(dim=0).norm()


def test_a_damaged_or_hostile_bundle(bundle):
    class Hostile:
        def __reduce__(self):
            return (Path.write_text, (bundle.with_name("harm"), "done"))

    contents = [b"", b"junk" * 100, bundle.read_bytes()[:-1000]]
    torch.save({"x": Hostile()}, bundle)
    contents.append(bundle.read_bytes())
    for content in contents:
        bundle.write_bytes(content)
        with pytest.raises(DheadsError, match="cannot download or read the speech encoder 'hubert-base'") as caught:
            load_speech_encoder("hubert-base")
        assert str(bundle.parent) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not bundle.with_name("harm").exists()


# --- Sound in pieces


def encoders() -> list[SpeechEncoder]:
    """One of each kind, small."""
    torch.manual_seed(0)
    bundle = BundleEncoder("bundle", torchaudio.models.wav2vec2_model(**SMALL).eval())
    bundle.chunk, bundle.margin = 30, 20
    return [WhisperEncoder(blocks=1).eval(), ReleasedEncoder(Recorder()), bundle]


@pytest.mark.parametrize("encoder", encoders(), ids=lambda encoder: encoder.name)
@pytest.mark.parametrize("samples", [0, 1, 319, 321, 960, 15_999, 58_674, 80 * 640 + 319, 80 * 640 + 321])
def test_embeddings_do_not_depend_on_the_pieces(encoder, samples, examples):
    sound = load_waveform(examples / "speech.wav")[:samples]
    for frames in (None, 20, 100):
        whole = encoder.encode(sound, frames)
        assert len(whole) == (frame_count(samples) if frames is None else frames)
        uneven = np.random.default_rng(samples).integers(0, samples + 1, 9).tolist()
        for pieces in (sound.split(16_000), sound.split(641), sound.tensor_split(sorted(uneven))):
            chunks = list(encoder.encode_pieces(pieces, frames))
            assert (torch.cat(chunks) - whole).abs().max() < 1e-6


@pytest.mark.parametrize("encoder", encoders(), ids=lambda encoder: encoder.name)
def test_sound_without_end_is_encoded_as_it_comes(encoder):
    heard = 0

    def pieces() -> Iterator[torch.Tensor]:
        nonlocal heard
        while True:
            heard += 4_000
            yield torch.full((4_000,), 0.1)

    given = 0
    chunks = encoder.encode_pieces(pieces())
    while given < 500:
        given += len(next(chunks))
        # Of the bundle the margin, of Whisper one second.
        assert heard <= (given + 26) * 640 + 4_000
