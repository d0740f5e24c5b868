"""The sound of written videos: as long as the source, in step with it, and AAC unless a copy is requested."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from test_sound import lag, speechlike, write_sound, write_wav

from dheads.config import AudioCodec
from dheads.media.sound import load_waveform
from dheads.media.writing import video_writer, write_video

SECONDS = 1.28  # close to whole packets of all codecs
BLACK = np.zeros((32, 32, 3), np.uint8)


def write(path: Path, codec: str, rate: int = 48_000, layout: str = "mono", seconds: float = SECONDS) -> Path:
    """Speech-like sound."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options={"strict": "-2"})
        if codec.startswith("wma"):
            stream.bit_rate = 128_000
        wave = speechlike(seconds, rate)
        for begin in range(0, len(wave), 1000):
            part = wave[None, begin : begin + 1000].repeat(stream.layout.nb_channels, 0)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), format="fltp", layout=layout)
            frame.rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def made(source: Path, codec: AudioCodec = "aac") -> tuple[Path, list[str]]:
    """A video with that sound, and the notes of its writer."""
    target = source.with_name("made.mp4")
    with video_writer(target, source, audio_codec=codec) as writer:
        for _ in range(round(25 * SECONDS)):
            writer.add(BLACK)
    return target, [note.removeprefix(f"{source}: ") for note in writer.notes]


def sound_of(path: Path) -> tuple[str, float, float]:
    """Codec, start and length in seconds of a video's sound, by its header."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        begin, length = (float((ticks or 0) * stream.time_base) for ticks in (stream.start_time, stream.duration))
        return stream.codec_context.codec.canonical_name, begin, length


# --- As long as the source, and in step

PAIRS = """
    wmav2.wma wmav1.asf wmav2.avi aac.wma
    pcm_s16le.mkv vorbis.mkv vorbis.webm ac3.mkv eac3.mkv mp2.mkv tta.mkv wavpack.mkv libopus.webm libmp3lame.mkv
    nellymoser.flv adpcm_swf.flv libmp3lame.flv aac.flv
    pcm_s16le.avi mp2.avi ac3.avi adpcm_ms.avi libmp3lame.avi
    vorbis.ogg libopus.ogg flac.ogg pcm_s24le.wav adpcm_ima_wav.wav pcm_mulaw.au g722.wav pcm_f64le.wav pcm_u8.wav
    alac.mov pcm_s16be.mov alac.m4a flac.mp4 libopus.mp4 aac.m4a ac3.mp4 pcm_s16be.aiff pcm_s16le.caf
    mp2.mpg aac.ts ac3.ts libopus.ts libmp3lame.ts flac.flac libmp3lame.mp3 tta.tta wavpack.wv
"""


@pytest.mark.parametrize("pair", PAIRS.split())
def test_the_sound_is_as_long_as_the_source_and_in_step(tmp_path: Path, pair: str) -> None:
    codec = pair.partition(".")[0]
    rate = {"nellymoser": 22_050, "adpcm_swf": 22_050, "g722": 16_000}.get(codec, 48_000)
    source = write(tmp_path / pair, codec, rate, "stereo" if codec == "vorbis" else "mono")
    heard = load_waveform(source).numpy()
    assert len(heard) / 16_000 == pytest.approx(SECONDS, abs=0.07)  # the last packet is padded
    late = lag(speechlike(SECONDS), heard)
    for wanted in ("aac", "copy"):
        kind, begin, length = sound_of(made(source, wanted)[0])
        block = 0.025 if kind == "aac" else 0.1
        assert begin + length == pytest.approx(len(heard) / 16_000, abs=0.002 if wanted == "aac" else block)
        again = load_waveform(source.with_name("made.mp4")).numpy()
        assert abs(lag(speechlike(SECONDS), again) - late) <= 8
        assert abs(len(again) - len(heard)) <= 0.1 * 16_000


def test_a_sample_rate_that_changes_midway(tmp_path: Path) -> None:
    """The encoder has one rate, so sound of the second rate is resampled, and follows directly."""
    parts = [write(tmp_path / "a.mp3", "libmp3lame", 44_100, "stereo"), write(tmp_path / "b.mp3", "libmp3lame", 22_050)]
    (tmp_path / "c.mp3").write_bytes(b"".join(part.read_bytes() for part in parts))
    heard = load_waveform(tmp_path / "c.mp3").numpy()
    again = load_waveform(made(tmp_path / "c.mp3")[0]).numpy()
    assert len(again) == pytest.approx(len(heard), abs=32)
    second = slice(round(SECONDS * 16_000), None)
    assert lag(speechlike(SECONDS), again[second]) == pytest.approx(lag(speechlike(SECONDS), heard[second]), abs=2)


def test_sound_that_begins_before_its_picture_is_whole(tmp_path: Path) -> None:
    """Sound from -0.5 s, as in Matroska: players begin with it, and show the first picture half a second later."""
    for codec in ("pcm_s16le", "flac", "libopus"):
        with av.open(str(tmp_path / "a.mkv"), "w", options={"avoid_negative_ts": "disabled"}) as container:
            stream = container.add_stream(codec, rate=48_000, layout="mono")
            frame = av.AudioFrame.from_ndarray(speechlike(SECONDS, 48_000)[None], format="fltp", layout="mono")
            frame.rate, frame.pts, frame.time_base = 48_000, -24_000, Fraction(1, 48_000)
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        heard = load_waveform(tmp_path / "a.mkv").numpy()
        assert len(heard) == pytest.approx(SECONDS * 16_000, abs=500)
        assert abs(lag(speechlike(SECONDS), heard)) <= 128  # Opus primes its decoder from -0.507 s on
        for wanted in ("aac", "copy"):
            again = load_waveform(made(tmp_path / "a.mkv", wanted)[0]).numpy()
            assert abs(lag(speechlike(SECONDS), again)) <= 128
            assert len(again) == pytest.approx(len(heard), abs=1_500)


# --- AAC, or a copy


@pytest.mark.parametrize(
    ("file", "codec", "by_default", "noted", "copied"),
    [
        ("a.m4a", "aac", "aac", False, "aac"),
        ("a.mp3", "libmp3lame", "aac", True, "mp3"),
        ("a.m4a", "alac", "aac", True, "alac"),
        ("a.ogg", "libopus", "aac", True, "opus"),
        ("a.flac", "flac", "aac", True, "flac"),
        ("a.wav", "pcm_s16le", "aac", False, None),
        ("a.wma", "wmav2", "aac", False, None),
    ],
)
def test_sound_becomes_aac_unless_a_copy_is_requested(
    tmp_path: Path, file: str, codec: str, by_default: str, noted: bool, copied: str | None
) -> None:
    source = write(tmp_path / file, codec)
    target, notes = made(source)
    kind = {"opus": "Opus", None: codec}.get(copied, (copied or "").upper())
    assert sound_of(target)[0] == by_default
    note = f"its {kind} sound is encoded to AAC, which plays everywhere; --audio copy keeps it as it is"
    assert notes == ([note] if noted else [])
    target, notes = made(source, "copy")
    assert sound_of(target)[0] == (copied or "aac")
    assert notes == ([] if copied else [f"MP4 cannot hold its {kind} sound, which is encoded to AAC"])
    if copied:
        with av.open(str(source)) as theirs, av.open(str(target)) as ours:
            packets = [[bytes(packet) for packet in c.demux(audio=0) if packet.size] for c in (theirs, ours)]
        assert packets[0] == packets[1]


def test_only_aac_that_every_player_knows_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HE-AAC, for which FFmpeg has no encoder here, loses its treble in players that support LC-AAC only."""
    source = write(tmp_path / "a.m4a", "aac")
    monkeypatch.setattr("dheads.media.soundtrack._kind", lambda codec: "HE-AAC")
    assert made(source)[1] == [
        "its HE-AAC sound is encoded to AAC, which plays everywhere; --audio copy keeps it as it is"
    ]
    assert made(source, "copy")[1] == []


@pytest.mark.parametrize(
    ("layout", "rate", "kilobits"),
    [("mono", 48_000, 128), ("stereo", 44_100, 192), ("5.1", 48_000, 576), ("mono", 8_000, 48)],
)
def test_encoded_sound_is_close_to_the_source(
    tmp_path: Path, examples: Path, layout: str, rate: int, kilobits: int
) -> None:
    """The bit rate is high, and the error on real speech is 28 to 45 dB below it."""
    with av.open(str(examples / "speech.wav")) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    speech = np.concatenate(frames, axis=1)[0] / 32768
    resampled = np.interp(np.arange(2 * rate) / rate, np.arange(len(speech)) / 22_050, speech).astype(np.float32)
    write_sound(tmp_path / "a.wav", resampled, rate, "pcm_s16le", layout)
    target, _ = made(tmp_path / "a.wav")
    with av.open(str(target)) as container:
        bits = 8 * sum(packet.size for packet in container.demux(audio=0))
    assert bits / 2000 == pytest.approx(kilobits, rel=0.15)
    source, again = (load_waveform(path).numpy() for path in (tmp_path / "a.wav", target))
    lost = again[: len(source)] - source
    assert 10 * np.log10(np.square(source).mean() / np.square(lost).mean()) > 27


@pytest.mark.parametrize(
    ("layout", "becomes"),
    [("quad", "4.0"), ("7.1", "5.1"), ("6 channels", "5.1"), ("2 channels (FL+FC)", "stereo"), ("20 channels", "mono")],
)
def test_channels_of_every_name_become_such_as_players_have(tmp_path: Path, layout: str, becomes: str) -> None:
    channels = av.AudioLayout(layout).nb_channels
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=16_000, layout=layout)
        samples = speechlike(SECONDS).repeat(channels)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="flt", layout=layout)
        frame.rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    target, _ = made(tmp_path / "a.mkv")
    with av.open(str(target)) as container:
        assert container.streams.audio[0].codec_context.layout.name == becomes
    heard = load_waveform(target).numpy()[: int(SECONDS * 16_000)]
    assert np.corrcoef(heard, speechlike(SECONDS))[0, 1] > 0.99


def test_a_stream_gets_the_encoded_sound_too(tmp_path: Path) -> None:
    source = write(tmp_path / "a.wma", "wmav2")
    stream = io.BytesIO()
    write_video(stream, [BLACK] * 50, source)
    stream.seek(0)
    assert abs(lag(load_waveform(source).numpy(), load_waveform(stream).numpy())) <= 2


def test_a_silent_file_is_encoded_too(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.zeros((round(SECONDS * 16_000), 2), np.int16), 16_000)
    assert sound_of(made(tmp_path / "a.wav")[0]) == ("aac", 0, pytest.approx(SECONDS, abs=1e-3))
