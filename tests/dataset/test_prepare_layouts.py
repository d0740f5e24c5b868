"""Corpora in their authors' layouts, prepared: their splits and sound, and the import of the released layout."""

from __future__ import annotations

import copy
import pickle
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from real_data import cut, decoded, sound_seconds, write_wav
from safetensors.torch import load_file

from dheads.config import override, preset
from dheads.dataset import prepare
from dheads.dataset.clip_worker import prepare_clip
from dheads.dataset.dataset import Dataset
from dheads.dataset.extraction import Detector
from dheads.dataset.importer import Importer
from dheads.dataset.manifest import read_clips
from dheads.dataset.sources import Source
from dheads.errors import DheadsError
from dheads.faces.alignment import mean_face
from dheads.media.sound import load_waveform
from dheads.media.writing import write_clip

pytest_plugins = "real_data"

TINY = preset("tiny")
SMALL_CREMA = override(preset("crema"), {"model": {"image_size": 64}})
DIM = SMALL_CREMA.conditioning.speech_dim


def remux(source: Path, target: Path, sound: bool) -> None:
    """The same packets in another container."""
    with av.open(str(source)) as given, av.open(str(target), "w") as made:
        streams = given.streams.get(video=0, audio=0 if sound else ())
        copies = {stream: made.add_stream_from_template(stream) for stream in streams}
        for packet in given.demux(*streams):
            if packet.size:
                packet.stream = copies[packet.stream]
                made.mux(packet)


# --- Raw corpora


def test_crema(shared: Path, tmp_path: Path, tried: list[str]) -> None:
    """Flash videos with separate sound files; the paper's actors are held out."""
    grid, raw = shared / "data" / "grid", tmp_path / "raw"
    (raw / "VideoFlash").mkdir(parents=True)
    (raw / "AudioWAV").mkdir()
    clips = {"1001_IEO_ANG_HI": "s1_bbal7s", "1015_DFA_SAD_XX": "s1_bbas3a", "1038_TIE_NEU_XX": "other_lbbc2a"}
    for name, source in clips.items():
        cut(grid / f"{source}.mp4", tmp_path / "cut.mp4", 6)
        remux(tmp_path / "cut.mp4", raw / "VideoFlash" / f"{name}.flv", sound=name.startswith("1001"))
        write_wav(raw / "AudioWAV" / f"{name}.wav", load_waveform(grid / f"{source}.mp4")[640 : 7 * 640])
    (raw / "VideoFlash" / "1002_IEO_ANG_HI.flv").touch()
    (raw / "README.md").touch()
    summary = prepare.prepare(raw, tmp_path / "data", TINY, progress=False)
    assert summary.layout == "crema"
    assert [name for name, _ in summary.failed] == ["VideoFlash/1002_IEO_ANG_HI.flv"]
    assert [(clip.clip, clip.speaker, clip.split, clip.frames) for clip in read_clips(tmp_path / "data")] == [
        ("1001/1001_IEO_ANG_HI", "1001", "train", 6),
        ("1015/1015_DFA_SAD_XX", "1015", "test", 6),
        ("1038/1038_TIE_NEU_XX", "1038", "val", 6),
    ]
    heard = load_waveform(tmp_path / "data" / "clips" / "1001" / "1001_IEO_ANG_HI.mp4")
    wanted = load_waveform(raw / "AudioWAV" / "1001_IEO_ANG_HI.wav")
    torch.testing.assert_close(heard[: 6 * 640], wanted, rtol=0, atol=1 / 32768)


def test_lrw(shared: Path, tmp_path: Path, tried: list[str]) -> None:
    """The corpus' own splits."""
    grid, raw = shared / "data" / "grid", tmp_path / "raw"
    for k, split in enumerate(("train", "val", "test")):
        for word in ("ABOUT", "WORDS"):
            cut(grid / "s1_bbal7s.mp4", raw / word / split / f"{word}_0000{k + 1}.mp4", 5)
    summary = prepare.prepare(raw, tmp_path / "data", TINY, progress=False)
    assert (summary.layout, summary.clips, summary.frames, summary.failed) == ("lrw", 6, 30, [])
    dataset = Dataset(tmp_path / "data")
    for k, split in enumerate(("train", "val", "test")):
        assert [clip.source for clip in dataset.split(split)] == [
            f"{word}/{split}/{word}_0000{k + 1}.mp4" for word in ("ABOUT", "WORDS")
        ]


def test_sound_and_picture_of_different_lengths(shared: Path, tmp_path: Path, detector: Detector) -> None:
    raw, source = tmp_path, Source("a.mp4", "a/a", "a", "train", sound="a.wav")
    cut(shared / "data" / "grid" / "s1_bbal7s.mp4", raw / "a.mp4", 10)
    sound = load_waveform(shared / "data" / "grid" / "s1_bbal7s.mp4")
    write_wav(raw / "a.wav", sound[: 17 * 640])
    with pytest.raises(DheadsError, match=r"^picture and sound differ in length by 0\.28 s$"):
        detector(raw, source)
    write_wav(raw / "a.wav", sound[: 16 * 640])
    assert len(detector(raw, source)) == 10, "the picture's"
    write_wav(raw / "a.wav", sound[: 4 * 640])
    assert len(detector(raw, source)) == 4, "the sound's"
    (raw / "a.wav").unlink()
    assert prepare_clip(detector, raw, tmp_path / "data", source) == "cannot read its sound: No such file or directory"


def test_a_face_that_is_too_small_to_learn_from(shared: Path, tmp_path: Path, detector: Detector) -> None:
    cut(shared / "data" / "grid" / "s1_bbal7s.mp4", tmp_path / "a.mp4", 5)
    shrunk = [cv2.resize(frame, (96, 96)) for frame in decoded(tmp_path / "a.mp4")]
    write_clip(tmp_path / "b.mp4", shrunk, torch.zeros(5 * 640))
    with pytest.raises(DheadsError, match=r"the face is .* px wide, less than 48"):
        detector(tmp_path, Source("b.mp4", "b/b", "b", "train"))


# --- The released layout


@pytest.fixture(scope="module")
def released_once(shared: Path, tmp_path_factory: pytest.TempPathFactory, detector: Detector) -> Path:
    """Two clips of two speakers, aligned at 128 px, with their sound, landmarks, embeddings and lists."""
    root, large = tmp_path_factory.mktemp("released"), copy.copy(detector)
    raw, large.config = root / "raw", override(TINY, {"model": {"image_size": 128}})
    for folder in ("video", "audio", "lmks", "audio_emb"):
        (raw / folder / "s1").mkdir(parents=True)
        (raw / folder / "s2").mkdir()
    for name, source in {"s1/a": "s1_bbal7s", "s2/b": "other_lbbc2a"}.items():
        cut(shared / "data" / "grid" / f"{source}.mp4", root / "cut.mp4", 12)
        made = large(root, Source("cut.mp4", name, "", ""))
        write_clip(raw / "video" / f"{name}.mp4", (frame for frame, _ in made.frames), made.waveform)
        write_wav(raw / "audio" / f"{name}.wav", made.waveform)
        depth = np.ones((12, 68, 1), np.float32)
        np.save(raw / "lmks" / f"{name}.npy", np.concatenate([made.labels["landmarks"].numpy(), depth], axis=2))
        torch.save(torch.randn(13, DIM), raw / "audio_emb" / f"{name}.pth")
    (raw / "file_list_train.txt").write_text("./s1/a.mp4\n")
    (raw / "file_list_test.txt").write_text("./s2/b.mp4\n")
    return raw


@pytest.fixture
def released(released_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(released_once, tmp_path / "raw")


def test_the_released_layout_is_imported(released: Path, tmp_path: Path, tried: list[str]) -> None:
    data = tmp_path / "data"
    summary = prepare.prepare(released, data, SMALL_CREMA, progress=False)
    assert (summary.layout, summary.clips, summary.frames, summary.failed) == ("released", 2, 24, [])
    assert [(clip.clip, clip.split) for clip in read_clips(data)] == [("s1/a", "train"), ("s2/b", "test")]
    for name in ("s1/a", "s2/b"):
        labels = load_file(data / "clips" / f"{name}.safetensors")
        given = np.load(released / "lmks" / f"{name}.npy")[..., :2]
        # A pixel's edges, not its centre, scale with the picture.
        np.testing.assert_allclose(labels["landmarks"], (given + 0.5) / 2 - 0.5, atol=1e-4)
        embeddings = torch.load(released / "audio_emb" / f"{name}.pth", weights_only=True)
        torch.testing.assert_close(labels["speech"].float(), embeddings[:12], rtol=0, atol=2e-3)
        large, small = (decoded(folder / f"{name}.mp4") for folder in (released / "video", data / "clips"))
        wanted = large.reshape(12, 64, 2, 64, 2, 3).mean(axis=(2, 4))
        assert np.abs((small - wanted) @ (0.2126, 0.7152, 0.0722)).mean() < 1.5
        x0, y0, x1, y1 = labels["mouth_box"].unbind(1)
        mouth = labels["landmarks"][:, 48:68]
        assert ((mouth[..., 0].min(1).values >= x0) & (mouth[..., 0].max(1).values <= x1)).all()
        assert ((mouth[..., 1].min(1).values >= y0) & (mouth[..., 1].max(1).values <= y1)).all()
        assert sound_seconds(data / "clips" / f"{name}.mp4") == pytest.approx(12 / 25, abs=0.02)


def test_imported_clips_train_with_the_papers_presets_only(released: Path, tmp_path: Path, tried: list[str]) -> None:
    prepare.prepare(released, tmp_path / "data", SMALL_CREMA, progress=False)
    info = tomllib.loads((tmp_path / "data" / "dataset.toml").read_text())
    assert (info["layout"], info["speech_encoder"], info["alignment"]["landmarks"]) == (
        *("released", "diffused-heads", "fan"),
    )
    dataset = Dataset(tmp_path / "data")
    dataset.check(SMALL_CREMA)
    dataset.check(override(preset("lrw"), {"model": {"image_size": 64}}))
    for changes in (
        {"model": {"image_size": 128}},
        {"alignment": {"eye_distance": 0.3}},
        {"alignment": {"landmarks": "mesh"}},
        {"conditioning": {"speech_encoder": "whisper-tiny.en"}},
    ):
        with pytest.raises(DheadsError, match=r"prepared with .*, but the configuration wants"):
            dataset.check(override(SMALL_CREMA, changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"alignment": {"landmarks": "mesh"}},
        {"alignment": {"eye_y": 0.5}},
        {"conditioning": {"speech_encoder": "whisper-tiny.en", "speech_dim": 384}},
    ],
)
def test_imported_clips_need_the_papers_presets(released: Path, tmp_path: Path, changes: dict) -> None:
    with pytest.raises(DheadsError, match="as the presets crema and lrw say; choose one of these with --preset"):
        prepare.prepare(released, tmp_path / "data", override(SMALL_CREMA, changes), progress=False)
    assert not (tmp_path / "data").exists()


def test_pictures_that_are_not_square_are_stretched(tmp_path: Path) -> None:
    """The landmarks too: x by the width, y by the height."""
    wide, high = 192, 128
    ramp = np.broadcast_to(np.linspace(20, 220, wide)[None, :, None], (high, wide, 3)).round().astype(np.uint8)
    write_clip(tmp_path / "a.mp4", [ramp] * 3, torch.zeros(3 * 640))
    square = mean_face(SMALL_CREMA.alignment, 64)  # (68, 2) px
    np.save(tmp_path / "a.npy", np.stack([(square + 0.5) * (wide / 64, high / 64) - 0.5] * 3))
    torch.save(torch.zeros(3, DIM), tmp_path / "a.pth")
    made = Importer(SMALL_CREMA)(tmp_path, Source("a.mp4", "a/a", "a", "train", None, "a.npy", "a.pth"))
    np.testing.assert_allclose(made.labels["landmarks"], np.stack([square] * 3), atol=1e-3)
    frames = [frame for frame, _ in made.frames]
    assert [frame.shape for frame in frames] == [(64, 64, 3)] * 3
    wanted = ramp[0].reshape(64, 3, 3).mean(axis=1)
    assert np.abs(frames[0] - wanted).max() <= 3


class Hostile:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('hostile code ran')",)


def shorter(path: Path) -> None:
    torch.save(torch.zeros(4, DIM), path)


@pytest.mark.parametrize(
    ("part", "damage", "reason"),
    [
        ("audio_emb", shorter, "picture, sound, landmarks and embeddings differ in length by 0.32 s"),
        (
            "audio_emb",
            lambda path: torch.save(torch.zeros(12, 7), path),
            "its embeddings are (12, 7) instead of a tens",
        ),
        (
            "audio_emb",
            lambda path: torch.save({"a": torch.zeros(1)}, path),
            "its embeddings are dict instead of a tens",
        ),
        (
            "audio_emb",
            lambda path: torch.save(torch.full((12, DIM), 1e9), path),
            "not all numbers of its speech are finite",
        ),
        (
            "audio_emb",
            lambda path: path.write_bytes(pickle.dumps(Hostile(), protocol=2)),
            "its embeddings cannot be loaded safely",
        ),
        ("audio_emb", Path.unlink, "FileNotFoundError: [Errno 2] No such file or directory: 'its embeddings'"),
        ("lmks", lambda path: np.save(path, np.zeros((12, 5, 2))), "its landmarks hold an array of (12, 5, 2) instead"),
        ("lmks", lambda path: np.save(path, np.zeros((12, 68, 2))), "the face is 0 px wide"),
        ("lmks", lambda path: np.save(path, np.full((12, 68, 2), np.nan)), "no face in any of 12 frames"),
        (
            "lmks",
            lambda path: np.save(path, np.array([Hostile()])),
            "its landmarks cannot be read (Object arrays",
        ),
        ("lmks", lambda path: path.write_bytes(b"\x93NUMPY"), "its landmarks cannot be read ("),
        ("video", lambda path: path.write_bytes(b"x"), "it is not a video or sound file"),
    ],
)
def test_files_that_cannot_be_imported(
    released: Path, tmp_path: Path, tried: list[str], part: str, damage: Callable[[Path], None], reason: str
) -> None:
    (path,) = (released / part / "s1").iterdir()
    damage(path)
    summary = prepare.prepare(released, tmp_path / "data", SMALL_CREMA, progress=False)
    assert summary.clips == 1
    ((source, said),) = summary.failed
    assert source == "video/s1/a.mp4"
    assert said.startswith(reason)
