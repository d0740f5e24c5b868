"""The containers that are written, by file name ending, and those that are read."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from videos import gray, number, packets, write_sound

from dheads.dataset.layouts import find_sources
from dheads.errors import DheadsError
from dheads.media.reading import VIDEOS, read_frames
from dheads.media.sound import load_waveform
from dheads.media.writing import container_of, write_video

# --- Writing


@pytest.mark.parametrize(
    ("name", "brand"), [("a.mp4", "isom"), ("a.M4V", "M4V "), ("a.mov", "qt  "), ("a.MOV", "qt  ")]
)
def test_a_file_is_what_its_name_says(tmp_path: Path, name: str, brand: str) -> None:
    write_sound(tmp_path / "s.wav", "pcm_s16le", 16_000, seconds=1)
    write_video(tmp_path / name, (gray(k) for k in range(25)), tmp_path / "s.wav")
    with av.open(str(tmp_path / name)) as container:
        assert container.metadata["major_brand"] == brand
        assert container.metadata["title"] == "AI-generated talking-head video"
        assert (container.streams.video[0].codec_context.name, container.streams.video[0].frames) == ("h264", 25)
        assert container.streams.audio[0].codec_context.name == "aac"
    assert [number(frame) for frame in read_frames(tmp_path / name)] == list(range(25))


@pytest.mark.parametrize(
    ("codec", "sound", "copied_into"),
    [
        ("aac", "s.m4a", {".mp4", ".m4v", ".mov"}),
        ("alac", "s.m4a", {".mp4", ".m4v", ".mov"}),
        ("libmp3lame", "s.mp3", {".mp4", ".mov"}),
        ("flac", "s.flac", {".mp4"}),
        ("libopus", "s.opus", {".mp4"}),
    ],
)
def test_sound_is_copied_where_the_container_holds_it(
    tmp_path: Path, codec: str, sound: str, copied_into: set[str]
) -> None:
    write_sound(tmp_path / sound, codec, 48_000, seconds=1)
    said = load_waveform(tmp_path / sound)
    for ending in (".mp4", ".m4v", ".mov"):
        video = tmp_path / f"o{ending}"
        write_video(video, (gray(k) for k in range(25)), tmp_path / sound, audio_codec="copy")
        assert (packets(video) == packets(tmp_path / sound)) == (ending in copied_into), ending
        heard = load_waveform(video)[: len(said)]
        assert np.corrcoef(heard, said[: len(heard)])[0, 1] > 0.97, "the same sound, in step"


@pytest.mark.parametrize("name", ["a.webm", "a.gif", "a.mkv", "a.avi", "a.wav", "a", "a.mp4.part", ".mp4"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    said = f"{tmp_path / name}: a video's name must end in .mp4, .m4v or .mov, as no other kind is made"
    with pytest.raises(DheadsError) as caught:
        container_of(tmp_path / name)
    assert str(caught.value) == said
    with pytest.raises(DheadsError, match="must end in"):
        write_video(tmp_path / name, [gray(0)], None)
    assert list(tmp_path.iterdir()) == []


# --- Reading

_ASF, _MPEG, _TS = ("wmv2", "wmav2"), ("mpeg2video", "mp2"), ("h264", "ac3")
# The format of a file with each ending: FFmpeg's container, the codecs of picture and sound.
MADE = {
    **dict.fromkeys([".mp4", ".m4v", ".f4v", ".3gp", ".3g2"], ("mp4", "h264", "aac")),
    **dict.fromkeys([".mov", ".qt"], ("mov", "mpeg4", "pcm_s16le")),
    **dict.fromkeys([".mkv", ".mk3d"], ("matroska", "h264", "flac")),
    ".webm": ("webm", "libvpx", "libopus"),
    **dict.fromkeys([".ogv", ".ogm"], ("ogg", "libvpx", "libopus")),
    ".nut": ("nut", "mpeg4", "mp3"),
    **dict.fromkeys([".mpg", ".mpeg", ".mpe", ".mod"], ("mpeg", *_MPEG)),
    ".vob": ("vob", "mpeg2video", "ac3"),
    **dict.fromkeys([".ts", ".mts", ".m2ts", ".m2t"], ("mpegts", *_TS)),
    ".tod": ("mpegts", *_MPEG),
    ".dv": ("dv", "dvvideo", "pcm_s16le"),
    ".mxf": ("mxf", "mpeg2video", "pcm_s16le"),
    **dict.fromkeys([".avi", ".divx"], ("avi", "mpeg4", "mp3")),
    **dict.fromkeys([".wmv", ".asf"], ("asf", *_ASF)),
    ".wtv": ("wtv", *_MPEG),
    ".flv": ("flv", "flv1", "mp3"),
    **dict.fromkeys([".rm", ".rmvb"], ("rm", "rv10", "ac3")),
}


def write_film(path: Path, container: str, picture: str, sound: str) -> None:
    """A second of ever brighter frames, with noise."""
    width, height = (720, 576) if picture == "dvvideo" else (352, 288)
    with av.open(str(path), "w", format=container) as film:
        video = film.add_stream(
            picture, rate=25, options={"deadline": "realtime", "cpu-used": "8"} if picture == "libvpx" else {}
        )
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = film.add_stream(sound, rate=48_000, layout="stereo")
        if sound == "wmav2":
            audio.bit_rate = 128_000
        for k in range(25):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 40 + 6 * k, np.uint8))
            frame.pts, frame.time_base = k, Fraction(1, 25)
            film.mux(video.encode(frame))
            noise = 0.1 * np.random.default_rng(k).standard_normal((2, 1920))
            samples = av.AudioFrame.from_ndarray(noise.astype(np.float32), format="fltp", layout="stereo")
            samples.rate, samples.pts, samples.time_base = 48_000, 1920 * k, Fraction(1, 48_000)
            film.mux(audio.encode(samples))
        film.mux(video.encode())
        film.mux(audio.encode())


@pytest.mark.parametrize("ending", sorted(VIDEOS))
def test_every_ending_of_a_video_is_found_and_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"A{ending.upper()}"
    write_film(path, *MADE[ending])
    assert [source.name for source in find_sources(tmp_path).sources] == [path.name]
    levels = [float(frame.mean()) for frame in read_frames(path)]
    assert len(levels) in (25, 26), "some containers round its end up"
    assert np.allclose(levels[:25], 40 + 6 * np.arange(25), atol=9), "right to a frame, as sound may begin before"
    assert len(load_waveform(path)) / 16_000 == pytest.approx(1, abs=0.1)
