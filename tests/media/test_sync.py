"""Sound and picture stay together: a flash and a beep, once a second, through `prepare` and through `sample`.

The largest offset between the start of a flash and of its beep is 21 ms after prepare (half a frame at 25 fps, and a
rounded time stamp) and 14 ms after sample, where their middles are at most 1 ms apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from real_data import in_this_process

from dheads.config import preset
from dheads.dataset import extraction
from dheads.dataset.extraction import Detector
from dheads.dataset.manifest import read_clips
from dheads.dataset.prepare import prepare
from dheads.extensions.network import ExtendedUNet
from dheads.faces.landmarks import load_backend
from dheads.media.reading import read_frames
from dheads.media.sound import SAMPLES_PER_FRAME, frame_count
from dheads.sampling import talker
from dheads.sampling.lockstep import VideoSpec

pytestmark = pytest.mark.slow

FRAME = 0.04  # seconds
SECONDS = 2.7
BEEP = 0.04
# When a flash is due; it comes with the first frame from then on. The marks fall on every phase of 25 fps.
MARKS = (0.4, 1.41, 2.43)


# --- Sources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """How a video of SECONDS is recorded. Pictures and sound show one scene, however late they begin."""

    name: str
    rate: Fraction = Fraction(25)
    times: tuple[float, ...] = ()  # of the pictures, where the rate is variable
    picture_from: float = 0.0
    sound_from: float = 0.0
    codecs: tuple[str, str] = ("libx264", "aac")
    hertz: int = 44_100

    def picture_times(self) -> list[float]:
        times = self.times or [float(i / self.rate) for i in range(int(SECONDS * self.rate))]
        return [time for time in times if time >= self.picture_from]

    def marks(self) -> list[float]:
        """When the beeps begin: with a picture, where there are pictures."""
        if not self.codecs[0]:
            return list(MARKS)
        return [min(time for time in self.picture_times() if time >= mark) for mark in MARKS]


def irregular() -> tuple[float, ...]:
    """Times in whole ms, 10 to 70 ms apart, as a phone in poor light records."""
    steps = np.random.default_rng(5).integers(10, 71, 200)
    times = np.concatenate([[0], np.cumsum(steps)])
    return tuple((times[times < SECONDS * 1000] / 1000).tolist())


RECORDINGS = [
    Recording("24.mp4", Fraction(24)),
    Recording("25.mp4"),
    Recording("29.97.mp4", Fraction(30_000, 1_001)),
    Recording("30.mp4", Fraction(30)),
    Recording("variable.mkv", times=irregular()),
    Recording("late-sound.mp4", sound_from=0.3),
    Recording("late-picture.mp4", Fraction(30), picture_from=0.2),
    Recording("early-sound.mkv", sound_from=-0.3),
    Recording("early-picture.mkv", times=tuple(k / 25 for k in range(-8, 67)), picture_from=-0.32),
    # As CREMA-D's own videos.
    Recording("crema.flv", Fraction(30_000, 1_001), codecs=("flv1", "libmp3lame")),
]


def record(path: Path, take: Recording, scene: list[np.ndarray]) -> None:
    """Write a take. scene: its pictures, 25 a second; one that begins at a mark, and until 40 ms later, is a flash."""
    early = {"avoid_negative_ts": "disabled"} if "early" in take.name else {}
    with av.open(str(path), "w", options=early) as container:
        streams = [recorded_pictures, recorded_sound] if take.codecs[0] else [recorded_sound]
        packets = [packet for stream in streams for packet in stream(container, take, scene)]
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)


def recorded_pictures(
    container: av.container.OutputContainer, take: Recording, scene: list[np.ndarray]
) -> Iterator[av.Packet]:
    fast = {"preset": "ultrafast"} if take.codecs[0] == "libx264" else {}
    stream = container.add_stream(take.codecs[0], rate=take.rate, options=fast)
    stream.width, stream.height = scene[0].shape[1::-1]
    stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
    tick = Fraction(1, 1000) if take.times else 1 / take.rate
    stream.codec_context.time_base = tick
    marks = take.marks()
    for time in take.picture_times():
        picture = scene[min(max(int(time / FRAME + 1e-6), 0), len(scene) - 1)]
        if any(-1e-6 < time - mark < BEEP for mark in marks):
            picture = np.clip(picture.astype(int) + 90, 0, 255).astype(np.uint8)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = round(time / tick), tick
        yield from stream.encode(frame)
    yield from stream.encode()


def recorded_sound(container: av.container.OutputContainer, take: Recording, _: object) -> Iterator[av.Packet]:
    """Silence with beeps of 1 kHz."""
    stream = container.add_stream(take.codecs[1], rate=take.hertz, layout="mono")
    first = round(take.sound_from * take.hertz)
    time = np.arange(first, round(SECONDS * take.hertz)) / take.hertz
    loud = np.any([(time >= mark) & (time < mark + BEEP) for mark in take.marks()], axis=0)
    samples = (0.7 * loud * np.sin(2 * np.pi * 1000 * time)).astype(np.float32)
    for offset in range(0, len(samples), 1024):
        frame = av.AudioFrame.from_ndarray(samples[None, offset : offset + 1024], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = take.hertz, first + offset, Fraction(1, take.hertz)
        yield from stream.encode(frame)
    yield from stream.encode()


# --- The times of pictures and sound in a player ---------------------------------------------------------------------


def played(path: Path, *spans: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Times (F,) and brightness (F,) of a file's pictures, times (N,) and samples (N,) of its sound, by its stamps.

    spans: of seconds; without any the whole file.
    """
    pictures, sounds = [], []
    for span in spans or [(0.0, math.inf)]:
        pictures += [(time, frame.to_ndarray(format="gray").mean()) for time, frame in presented(path, "video", *span)]
        resampler = av.AudioResampler(format="fltp", layout="mono")
        for time, frame in presented(path, "audio", *span):
            (same,) = resampler.resample(frame)
            samples = same.to_ndarray()[0]
            sounds.append((time + np.arange(len(samples)) / frame.sample_rate, samples))
    shown, brightness = np.array(pictures).T
    heard, samples = (np.concatenate(parts) for parts in zip(*sounds, strict=True))
    return shown, brightness, heard, samples


def presented(path: Path, kind: str, begin: float, end: float) -> Iterator[tuple[float, av.frame.Frame]]:
    """When a player shows or plays each of a stream's frames between two times, and the frame."""
    with av.open(str(path)) as container:
        start = container.start_time / av.time_base
        if begin > 1:  # a decoder needs a moment to settle
            container.seek(round((begin - 1 + start) * av.time_base))
        for frame in container.decode(**{kind: 0}):
            if frame.time - start > end:
                return
            if frame.time - start >= begin:
                yield frame.time - start, frame


def marks_of(times: np.ndarray, level: np.ndarray, span: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """When each flash or beep begins, and where its middle is. A value stands for `span` seconds from its time on."""
    loud = level > 0.25 * level.max()
    begins = times[loud][np.diff(times[loud], prepend=-1.0) > 0.3]
    assert len(begins) == len(MARKS)
    near = [(times > begin - 0.15) & (times < begin + 0.25) for begin in begins]
    middles = [(times[part] * level[part]).sum() / level[part].sum() + span / 2 for part in near]
    return begins, np.array(middles)


# --- prepare ---------------------------------------------------------------------------------------------------------


class Known:
    """A substitute for a detector: the face of a scene, which all recordings show, is found once."""

    def __init__(self, landmarks: np.ndarray) -> None:
        self._landmarks = landmarks

    def track(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        last = len(self._landmarks) - 1
        return np.stack([self._landmarks[min(k, last)] for k, _ in enumerate(frames)])


class Unheard:
    """A substitute for the speech encoder: all sound is alike."""

    def encode(self, waveform: torch.Tensor, frames: int) -> torch.Tensor:
        return torch.zeros(frames, preset("tiny").conditioning.speech_dim)

    def encode_at(self, tempo: float, waveform: torch.Tensor, frames: int) -> torch.Tensor:
        return self.encode(waveform, frames)


@pytest.fixture(scope="module")
def prepared(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The prepared clip of every recording, by name."""
    folder = tmp_path_factory.mktemp("sync")
    person = folder / "raw" / "person"
    person.mkdir(parents=True)
    source = shared / "data" / "talkvid" / "Age_31-45_1.mp4"
    scene = [
        cv2.resize(picture, (160, 160), interpolation=cv2.INTER_AREA)
        for picture in islice(read_frames(source), round(SECONDS / FRAME))
    ]
    for take in RECORDINGS:
        record(person / take.name, take, scene)
    detector = Detector(preset("tiny"), "cpu")
    detector.backend, detector.encoder = Known(load_backend("mesh").track(scene)), Unheard()
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch, detector)
        patch.setattr(extraction, "openness_of_frame", lambda frame, landmarks: 0.3)
        summary = prepare(folder / "raw", folder / "data", preset("tiny"), progress=False)
    assert summary.failed == []
    return {Path(c.source).name: folder / "data" / "clips" / f"{c.clip}.mp4" for c in read_clips(folder / "data")}


@pytest.mark.parametrize("take", RECORDINGS, ids=lambda take: take.name)
def test_prepared_flashes_and_beeps_are_together(prepared: dict[str, Path], take: Recording) -> None:
    shown, brightness, heard, samples = played(prepared[take.name])
    np.testing.assert_allclose(np.diff(shown), FRAME, atol=1e-6)
    flashes, _ = marks_of(shown, np.maximum(brightness - np.median(brightness) - 8, 0))
    beeps, _ = marks_of(heard, samples**2)
    assert np.abs(flashes - beeps).max() <= 0.6 * FRAME


# --- sample ----------------------------------------------------------------------------------------------------------

SOUNDS = [
    Recording("speech.wav", codecs=("", "pcm_s16le"), hertz=16_000),
    Recording("speech.mp3", codecs=("", "libmp3lame")),
    Recording("speech.m4a", codecs=("", "aac")),
    Recording("speech.ogg", codecs=("", "libopus"), hertz=48_000),
    Recording("early.mka", codecs=("", "aac"), sound_from=-0.3),
    Recording("late.m4a", codecs=("", "aac"), sound_from=0.3),
    *(take for take in RECORDINGS if take.name.startswith(("29.97", "late-", "early-"))),
]


class Energy:
    """A substitute for a speech encoder: the loudness (F, 1) of the 40 ms of each frame."""

    def encode_pieces(self, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        waveform = torch.cat(list(pieces))
        frames = frame_count(len(waveform))
        sound = torch.nn.functional.pad(waveform, (0, max(0, frames * SAMPLES_PER_FRAME - len(waveform))))
        yield sound[: frames * SAMPLES_PER_FRAME].view(frames, -1).square().mean(dim=1, keepdim=True)


def bright_where_loud(_: object, video: VideoSpec) -> Iterator[np.ndarray]:
    photo, speech = video.photo, torch.cat(list(video.speech))
    for level in (speech[:, 0] / speech.max()).tolist():
        yield np.full_like(photo, 20 + round(200 * level))


@pytest.mark.parametrize("take", SOUNDS, ids=lambda take: take.name)
def test_sampled_flashes_and_beeps_are_together(
    take: Recording, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / take.name, take, [np.full((64, 64, 3), 90, np.uint8)])
    tiny = preset("tiny")
    monkeypatch.setattr(talker, "load_model", lambda *_: (ExtendedUNet(tiny), tiny, {}))
    monkeypatch.setattr(talker, "load_speech_encoder", lambda *_: Energy())
    monkeypatch.setattr(talker, "frames_of", bright_where_loud)
    made = talker.load(device="cpu", progress=False).sample(
        examples / "face.jpg", tmp_path / take.name, tmp_path / "out.mp4"
    )
    shown, brightness, heard, samples = played(made.path)
    flashes, middles = marks_of(shown, np.maximum(brightness - brightness.min() - 4, 0), FRAME)
    beeps, beep_middles = marks_of(heard, samples**2)
    assert np.abs(flashes - beeps).max() <= FRAME
    assert np.abs(middles - beep_middles).max() <= 0.1 * FRAME
