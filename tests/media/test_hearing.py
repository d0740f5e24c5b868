"""The choice of a file's sound stream, channels and gain; usual sound is left as it is."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torchaudio.functional as AF
from test_sound import lag, speechlike, write_sound, write_wav

from dheads.errors import DheadsError
from dheads.media import containers as media
from dheads.media import hearing
from dheads.media.hearing import hear, played_stream
from dheads.media.sound import load_waveform
from dheads.media.writing import write_video
from dheads.sampling.talker import Talker
from dheads.speech.sync import correlation

RATE = 16_000


@pytest.fixture(scope="module")
def speech(examples: Path) -> np.ndarray:
    """(N,) float32, 16 kHz, at -21 dB."""
    return load_waveform(examples / "speech.wav").numpy()


def decibels(samples: np.ndarray | torch.Tensor) -> float:
    return float(10 * np.log10(np.square(np.asarray(samples, np.float64)).mean() + 1e-30))


def noise(like: np.ndarray, level_db: float, seed: int = 0) -> np.ndarray:
    return 10 ** (level_db / 20) * np.random.default_rng(seed).standard_normal(like.shape).astype(np.float32)


def music(like: np.ndarray, level_db: float = -15) -> np.ndarray:
    """A chord with a beat."""
    t = np.arange(len(like)) / RATE
    chord = sum(np.sin(2 * np.pi * f * t) for f in (220, 277, 330)) * (0.6 + 0.4 * np.sin(4 * np.pi * t))
    return (chord * 10 ** ((level_db - decibels(chord)) / 20)).astype(np.float32)


# --- Usual sound


@pytest.mark.parametrize("level_db", [0, -13])
@pytest.mark.parametrize("width", [0.0, 0.3, 1.0])
def test_usual_sound_is_the_mean_of_its_channels_to_the_bit(
    tmp_path: Path, speech: np.ndarray, width: float, level_db: float
) -> None:
    """Mono and stereo: speech in the middle, different room noise on each side, music on one side."""
    gain = 10 ** (level_db / 20)
    channels = gain * np.stack([speech + width * music(speech, -30), speech + width * noise(speech, -30)])
    data = (channels[: 1 if width == 0 else 2] * 32767).round().astype(np.int16).T
    write_wav(tmp_path / "a.wav", data, 44_100)
    mean = (data / 32768).mean(axis=1).astype(np.float32)
    assert torch.equal(load_waveform(tmp_path / "a.wav"), AF.resample(torch.from_numpy(mean), 441, 160).clamp(-1, 1))
    heard = hear(tmp_path / "a.wav")
    assert (heard.gain, heard.notes, set(heard.signs)) == (1, [], {1})


def test_recordings_that_networks_were_trained_on_are_heard_as_they_are(shared: Path) -> None:
    clips = sorted((shared / "data").glob("*/*.mp4"))[::25] + sorted((shared / "samples").glob("*.wav"))
    assert len(clips) > 10
    for clip in clips:
        heard = hear(clip)
        assert (heard.gain, heard.notes, set(heard.signs)) == (1, [], {1}), clip


def test_little_of_a_usual_recording_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []
    read = media._samples
    monkeypatch.setattr(media, "_samples", lambda frame: times.append(frame.time) or read(frame))
    for channels, seconds in ((1, 3), (2, 62)):
        write_wav(tmp_path / "a.wav", np.tile(speechlike(10.0), 12)[:, None].repeat(channels, 1), RATE, 3)
        hear(tmp_path / "a.wav")
        assert times[-1] < seconds
    times.clear()
    write_wav(tmp_path / "a.wav", 1e-3 * np.tile(speechlike(10.0), 12)[:, None], RATE, 3)
    hear(tmp_path / "a.wav")
    assert times[-1] > 119, "what is loud may come late"


# --- Loudness


@pytest.mark.parametrize(("codec", "file"), [("pcm_f32le", "a.wav"), ("pcm_s16le", "a.wav"), ("libmp3lame", "a.mp3")])
@pytest.mark.parametrize("level_db", [-30, -50, -60])
def test_very_quiet_speech_is_heard_as_loud_as_usual(
    tmp_path: Path, speech: np.ndarray, file: str, codec: str, level_db: float
) -> None:
    write_sound(tmp_path / file, speech * 10 ** (level_db / 20), RATE, codec)
    heard = load_waveform(tmp_path / file).numpy()[: len(speech)]
    assert decibels(heard) == pytest.approx(-20.9, abs=1)
    assert np.corrcoef(heard, speech)[0, 1] > 0.99
    gain = round(20 * np.log10(hear(tmp_path / file).gain))
    assert gain == pytest.approx(-level_db, abs=1)
    assert hear(tmp_path / file).notes == [
        f"{tmp_path / file}: it is very quiet; the lips follow it made {gain} dB louder"
    ]


def test_a_click_is_not_loudness_and_direct_current_is_not_amplified(tmp_path: Path, speech: np.ndarray) -> None:
    quiet = speech * 10 ** (-50 / 20)
    clicked = quiet.copy()
    clicked[2000:2100] = 0.9
    for samples in (clicked, quiet + 0.02):
        write_wav(tmp_path / "a.wav", samples[:, None].astype(np.float32), RATE, 3)
        heard = load_waveform(tmp_path / "a.wav").numpy()
        assert np.corrcoef(heard[4000:], speech[4000:])[0, 1] > 0.999
        assert decibels(heard[4000:]) == pytest.approx(decibels(speech[4000:]), abs=1.5)


def test_one_word_in_a_long_silence_is_as_loud_as_it_is(tmp_path: Path, speech: np.ndarray) -> None:
    samples = np.zeros(40 * RATE, np.float32)
    samples[30 * RATE :][:5000] = speech[20_000:25_000]
    write_wav(tmp_path / "a.wav", samples[:, None], RATE, 3)
    assert np.array_equal(load_waveform(tmp_path / "a.wav").numpy(), samples)
    write_wav(tmp_path / "a.wav", 1e-2 * samples[:, None], RATE, 3)
    heard = load_waveform(tmp_path / "a.wav").numpy()
    assert decibels(heard[30 * RATE :][:5000]) > -25
    assert not heard[: 30 * RATE].any(), "nothing is made of nothing"


@pytest.mark.parametrize("level_db", [-200, -95])
def test_silence_stays_silent(tmp_path: Path, speech: np.ndarray, level_db: float) -> None:
    """Digital silence, and noise of a converter's last bit."""
    write_wav(tmp_path / "a.wav", noise(speech, level_db)[:, None], RATE, 3)
    assert decibels(load_waveform(tmp_path / "a.wav")) == pytest.approx(level_db, abs=1)
    assert hear(tmp_path / "a.wav").notes == [f"{tmp_path / 'a.wav'}: it is silent, so the mouth rests"]


# --- Channels


def heard_of(tmp_path: Path, *channels: np.ndarray, layout: str = "stereo") -> tuple[np.ndarray, list[str]]:
    write_sound(tmp_path / "a.wav", np.stack(channels), RATE, "pcm_f32le", layout)
    notes = [note.removeprefix(f"{tmp_path / 'a.wav'}: ") for note in hear(tmp_path / "a.wav").notes]
    return load_waveform(tmp_path / "a.wav").numpy(), notes


def test_channels_that_cancel_each_other_are_turned(tmp_path: Path, speech: np.ndarray) -> None:
    said = ["its channels cancel each other; the lips follow it with one inverted"]
    for other in (-speech, -0.98 * speech, -0.5 * speech + noise(speech, -60)):
        heard, notes = heard_of(tmp_path, speech, other)
        assert notes == said
        assert np.corrcoef(heard, speech)[0, 1] > 0.999
        assert decibels(heard) > -24
    hum = 0.05 * np.sin(2 * np.pi * 50 * np.arange(len(speech)) / RATE).astype(np.float32)
    heard, notes = heard_of(tmp_path, speech + hum, -speech + hum)
    assert notes == said
    assert np.abs(heard - speech).max() < 1e-3, "what a balanced cable picks up is what cancels"
    heard, _ = heard_of(tmp_path, speech, -speech, speech, -speech, layout="quad")
    assert np.abs(np.abs(heard) - np.abs(speech)).max() < 1e-6


def test_other_stereo_is_not_turned(tmp_path: Path, speech: np.ndarray) -> None:
    silence, late = np.zeros_like(speech), np.roll(speech, 80)  # 5 ms, as from a microphone 1.7 m away
    for left, right in ((speech, silence), (speech, late), (noise(speech, -20), noise(speech, -20, 1))):
        heard, notes = heard_of(tmp_path, left, right)
        assert notes == []
        assert np.array_equal(heard, ((left + right) / 2).astype(np.float32))


def test_the_centre_of_film_sound_is_heard(tmp_path: Path, speech: np.ndarray) -> None:
    around = [music(speech, level) for level in (-12, -12, -30, -18, -18)]
    film = [*around[:2], speech, *around[2:]]
    heard, notes = heard_of(tmp_path, *film, layout="5.1")
    assert notes == ["of its 5.1 channels the lips follow the centre"]
    assert np.array_equal(heard, speech)
    silence = np.zeros_like(speech)
    heard, notes = heard_of(tmp_path, speech, speech, silence, silence, *around[3:], layout="5.1")
    assert notes == [], "nobody speaks in the centre"
    assert np.allclose(heard, (2 * speech + 2 * around[3]) / 6, atol=1e-7)


@pytest.mark.parametrize(("codec", "file"), [("aac", "a.mp4"), ("libopus", "a.ogg"), ("pcm_s16le", "a.wav")])
def test_eight_channels_are_read_and_no_more(tmp_path: Path, speech: np.ndarray, codec: str, file: str) -> None:
    """PyAV would read beyond the last of eight planes and crash."""
    speech = speech[:24_000]
    channels = [music(speech, -20)] * 8
    channels[2] = speech
    with av.open(str(tmp_path / file), "w") as container:
        stream = container.add_stream(codec, rate=48_000, layout="7.1")
        samples = AF.resample(torch.from_numpy(np.stack(channels)), 1, 3).numpy().T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(samples, format="flt", layout="7.1")
        frame.rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert hear(tmp_path / file).notes == [f"{tmp_path / file}: of its 7.1 channels the lips follow the centre"]
    assert np.corrcoef(load_waveform(tmp_path / file).numpy()[: len(speech)], speech)[0, 1] > 0.99
    write_video(tmp_path / "o.mp4", [np.zeros((32, 32, 3), np.uint8)] * 38, tmp_path / file)
    assert np.corrcoef(load_waveform(tmp_path / "o.mp4").numpy()[: len(speech)], speech)[0, 1] > 0.99


def test_channels_may_change_midway(tmp_path: Path, speech: np.ndarray) -> None:
    """As when a broadcast goes from a trailer to a film: the new channels are measured from then on."""
    write_sound(tmp_path / "a.mp3", speech, RATE, "libmp3lame", "mono")
    write_sound(tmp_path / "b.mp3", np.stack([speech, -speech]), RATE, "libmp3lame", "stereo")
    (tmp_path / "c.mp3").write_bytes((tmp_path / "a.mp3").read_bytes() + (tmp_path / "b.mp3").read_bytes())
    heard = load_waveform(tmp_path / "c.mp3").numpy()
    assert decibels(heard[: len(speech)]) == pytest.approx(decibels(speech), abs=1)
    assert hear(tmp_path / "c.mp3").gain == 1


# --- Streams


def tracks(path: Path, *sounds: np.ndarray, flags: tuple[int, ...] = ()) -> Path:
    """A file with one AAC stream for each sound."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("aac", rate=RATE, layout="mono") for _ in sounds]
        for stream, flag in zip(streams, flags, strict=False):
            stream.disposition = flag
        for begin in range(0, len(sounds[0]), 1024):
            for stream, sound in zip(streams, sounds, strict=True):
                frame = av.AudioFrame.from_ndarray(sound[None, begin : begin + 1024], format="fltp", layout="mono")
                frame.rate, frame.pts = RATE, begin
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    return path


DEFAULT, COMMENT, IMPAIRED = 1, 8, 256


@pytest.mark.parametrize(
    ("file", "order", "flags", "taken", "note"),
    [
        ("a.mkv", "sm", (DEFAULT, 0), 0, None),
        ("a.mkv", "sm", (0, 0), 0, None),
        ("a.mp4", "sm", (DEFAULT, 0), 0, None),
        ("a.mkv", "ms", (0, DEFAULT), 1, "taking sound stream 2 of 2, the one that players choose"),
        (
            "a.mkv",
            "mms",
            (COMMENT | DEFAULT, IMPAIRED, 0),
            2,
            "taking sound stream 3 of 3, the one that players choose",
        ),
        ("a.mp4", "0s", (DEFAULT, 0), 1, "taking sound stream 2 of 2, because the one that players choose is silent"),
        (
            "a.mkv",
            "00sm",
            (0, DEFAULT, 0, 0),
            2,
            "taking sound stream 3 of 4, because the one that players choose is silent",
        ),
        ("a.mkv", "00", (0, 0), 0, "it is silent, so the mouth rests"),
    ],
)
def test_the_stream_that_is_heard_is_the_videos_sound(
    tmp_path: Path, speech: np.ndarray, file: str, order: str, flags: tuple[int, ...], taken: int, note: str | None
) -> None:
    """s: speech, m: music, 0: silence."""
    sounds = {"s": speech, "m": music(speech), "0": np.zeros_like(speech)}
    path = tracks(tmp_path / file, *(sounds[name] for name in order), flags=flags)
    assert hear(path).notes == ([] if note is None else [f"{path}: {note}"])
    assert hear(path).stream == played_stream(path) == taken
    write_video(tmp_path / "o.mp4", [np.zeros((32, 32, 3), np.uint8)] * 92, path)
    with av.open(str(path)) as source, av.open(str(tmp_path / "o.mp4")) as made:
        copied, wanted = (
            [bytes(packet) for packet in container.demux(container.streams.audio[number]) if packet.size]
            for container, number in ((made, 0), (source, taken))
        )
    assert copied == wanted
    heard, truth = load_waveform(path).numpy(), sounds[order[taken]]
    if truth.any():
        late = lag(truth, heard)
        assert 0 <= late <= 1024, "Matroska keeps AAC's priming"
        heard = heard[late:][: len(truth)]
        assert len(truth) - len(heard) < RATE / 1000, "Matroska may cut the last packet, to a millisecond"
        assert np.corrcoef(heard, truth[: len(heard)])[0, 1] > 0.97
    else:
        assert not heard.any()


def test_a_stream_that_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    class Pipe(io.BytesIO):
        name = "<pipe>"

        def seekable(self) -> bool:
            return False

    for read in (hear, load_waveform):
        with pytest.raises(DheadsError, match="<pipe> is a pipe or a device; give a sound or video file"):
            read(Pipe(b"RIFF"))


# --- The lips


@pytest.fixture(scope="module")
def lip_code(packaged: Talker) -> Callable[[Path], np.ndarray]:
    """The lip code (F,), its opening, that the packaged weights foretell from a file's sound."""
    lips = packaged.unet.lip_predictor
    assert lips is not None
    return lambda path: lips.predict(torch.cat(list(packaged.hear([load_waveform(path)]))))[:, 0].numpy()


def test_lips_follow(
    tmp_path: Path,
    speech: np.ndarray,
    lip_code: Callable[[Path], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The predicted openings correlate with those of the same speech at its usual level in one channel."""
    speech = speech[: round(1.4 * RATE)]
    write_wav(tmp_path / "a.wav", speech[:, None], RATE, 3)
    truth = lip_code(tmp_path / "a.wav")
    around = [music(speech, -15)] * 2
    cases = {
        "inverted": np.stack([speech, -speech]),
        "film": np.stack([*around, speech, *around, around[0]]),
        "-60 dB": speech[None] * 10 ** (-60 / 20),
        "-45 dB in a room": speech[None] * 10 ** (-45 / 20) + noise(speech[None], -90),
    }
    followed = {}
    for name, channels in cases.items():
        layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(channels)]
        write_sound(tmp_path / "a.wav", channels.astype(np.float32), RATE, "pcm_f32le", layout)
        followed[name] = correlation(lip_code(tmp_path / "a.wav"), truth)
    assert min(followed.values()) > 0.95, followed
    # Without gain, -60 dB gives 0.00; without inversion, channels that cancel are silent.
    monkeypatch.setattr(hearing, "_QUIET", -200)
    write_wav(tmp_path / "a.wav", cases["-60 dB"].T, RATE, 3)
    assert correlation(lip_code(tmp_path / "a.wav"), truth) < 0.2
