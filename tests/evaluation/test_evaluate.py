"""`dheads eval`: degraded copies of real clips, what fails, and weights scored end to end."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from conftest import program
from real_data import cut, dheads, in_this_process
from torch import Tensor, nn

from dheads.config import FPS, SAMPLE_RATE, override, preset
from dheads.dataset.dataset import Dataset
from dheads.dataset.extraction import Detector
from dheads.dataset.manifest import clip_path
from dheads.errors import DheadsError
from dheads.evaluation import instruments
from dheads.evaluation.evaluate import _still_heads, evaluate, evaluate_weights
from dheads.evaluation.remake import clip_speech
from dheads.evaluation.report import write_report
from dheads.evaluation.results import ClipReport, Report
from dheads.media.reading import read_frames
from dheads.media.sound import load_waveform
from dheads.media.writing import write_clip, write_video
from dheads.speech.encoders import load_speech_encoder

FRAMES = 32
PERFECT = {
    "ssim": 1,
    "psnr": 100,
    "lmd": 0,
    "mouth_correlation": 1,
    "mouth_range_ratio": 1,
    "mouth_sharpness": 1,
    "mouth_offset_frames": 0,
    "fid": 0,
    "fvd": 0,
    "wer": 0,
    "frames": FRAMES,
}
# Measures that need a download or a lip reader.
NOT_PACKAGED = {"av_offset", "av_confidence", "av_distance", "fid", "fvd", "identity_similarity", "wer"}


# ---- Stand-ins for networks that need a download ----


class LoudnessNet(nn.Module):
    """Stands in for SyncNet: embeds sound by its loudness, and pictures by the brightness of their lower middle."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))  # has the device

    def embed_sound(self, mfcc: Tensor) -> Tensor:  # (N, 1, 13, 20)
        return _standard(mfcc[:, 0, 0].unflatten(1, (5, 4)).mean(dim=-1))

    def embed_picture(self, pictures: Tensor) -> Tensor:  # (N, 3, 5, 224, 224)
        return -_standard(pictures[:, :, :, 112:180, 80:144].mean(dim=(1, 3, 4)))


def _standard(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows - rows.mean(dim=1, keepdim=True))


def thumbnail(frame: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """A face embedding of length 1; NaN without a face."""
    if not np.isfinite(landmarks).all():
        return np.full(108, np.nan)
    small = cv2.resize(frame, (6, 6), interpolation=cv2.INTER_AREA).ravel().astype(float)
    return small / np.linalg.norm(small)


def features(frames: np.ndarray) -> np.ndarray:
    """(F, 3): the mean colour of each frame."""
    return frames.mean(axis=(1, 2))


def clip_features(frames: np.ndarray) -> np.ndarray:
    """(F // 16, 3): one row per 16 frames, as from I3D."""
    return features(frames)[: len(frames) // 16 * 16 : 16]


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for all weights, as if they were cached."""
    monkeypatch.setattr(instruments, "cached", Path)
    monkeypatch.setattr(instruments, "load_syncnet", lambda *_: LoudnessNet())
    monkeypatch.setattr(instruments, "load_recogniser", lambda *_: thumbnail)
    monkeypatch.setattr(instruments, "load_inception", lambda *_: features)
    monkeypatch.setattr(instruments, "load_i3d", lambda *_: clip_features)


@pytest.fixture
def no_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DHEADS_HOME", str(tmp_path / "empty"))


# ---- Real clips ----


@pytest.fixture(scope="module")
def clip(shared: Path) -> Path:
    return shared / "data" / "hdtf" / "WDA_BobMenendez_000.mp4"


@pytest.fixture(scope="module")
def small_clip(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its beginning at half its size, as most measures take time by the pixel."""
    small = [cv2.resize(frame, (128, 128), interpolation=cv2.INTER_AREA) for frame in islice(read_frames(clip), FRAMES)]
    path = tmp_path_factory.mktemp("clip") / clip.name
    write_clip(path, np.stack(small), load_waveform(clip)[: FRAMES * SAMPLE_RATE // FPS])
    return path


@pytest.fixture(autouse=True, scope="module")
def loaded_once() -> Iterator[None]:
    """The packaged networks of the measure of lips and sound, which every evaluation loads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instruments, "LipSync", cache(instruments.LipSync))
        patch.setattr(instruments, "load_speech_encoder", cache(instruments.load_speech_encoder))
        yield


@pytest.fixture(scope="module")
def degradations() -> ModuleType:
    """benchmarks/degradations.py"""
    return program("benchmarks/degradations.py")


@pytest.fixture(scope="module")
def faults(degradations: ModuleType, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The summary of each fault."""
    folder = tmp_path_factory.mktemp("faults")
    chosen = ["blurred", "frozen", "mouth frozen", "colour drifts", "trembles", "grows wider", "picture 3 frames late"]
    chosen += ["head frozen", "head wobbles"]
    return {fault: report.summary for fault, report in degradations.measure([clip], 16, folder, chosen).items()}


def test_the_truth_against_itself_is_perfect(networks: None, small_clip: Path, tmp_path: Path) -> None:
    """In every measure; and a second run gives the same digits."""
    words = tmp_path / "words.csv"
    words.write_text("clip,words\nspeaker/one,bin blue\n")
    real = tmp_path / "real" / "speaker" / "one.mp4"
    real.parent.mkdir(parents=True)
    cut(small_clip, real, FRAMES)
    reader = f"{sys.executable} -c \"print('Bin blue.')\" {{video}}"
    folder = tmp_path / "real"
    for out in ("first", "second"):
        report = evaluate(folder, folder, out=tmp_path / out, lip_reader=reader, words=words, progress=False)
    values = report.summary
    assert {name: values[name] for name in PERFECT} == pytest.approx(PERFECT, abs=1e-6)
    own = {name for name in values if f"true_{name}" in values}
    assert {"av_offset", "identity_similarity", "ofm_paper", "ofm", "fmse", "blinks_per_second"} <= own
    assert {name: values[name] for name in own} == {name: values[f"true_{name}"] for name in own}
    assert 0.9 < values["identity_similarity"] < 1
    assert report.unavailable == {}
    assert report.failed == []
    for name in ("report.json", "clips.csv"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    (row,) = report.clips
    assert row.clip == "speaker/one"
    assert row.curves["sharpness"] == [1, 1]
    assert row.curves["mouth_correlation"] == pytest.approx([1, 1])
    assert len(row.curves["colour"]) == len(row.curves["identity_shape"]) == 2
    assert any(f"fid: {FRAMES} samples" in warning for warning in report.warnings)


def test_late_sound_moves_the_measures_of_sound_alone(
    networks: None, degradations: ModuleType, small_clip: Path, tmp_path: Path
) -> None:
    reports = degradations.measure([small_clip], 30, tmp_path, ["none", "sound 5 frames late"])
    before, after = (report.summary for report in reports.values())
    assert after["av_offset"] == before["av_offset"] - 5  # the sound comes after its picture
    assert after["true_av_offset"] == before["av_offset"]
    moved = {name for name, value in after.items() if value != before[name]}
    assert moved == {"av_offset", "av_confidence", "av_distance"}


def test_each_fault_is_caught(faults: dict[str, dict]) -> None:
    assert faults["blurred"]["mouth_sharpness"] < 0.3
    assert faults["blurred"]["mouth_correlation"] > 0.8
    assert faults["blurred"]["ssim"] < 0.95
    assert faults["frozen"]["mouth_range_ratio"] < 0.05
    assert faults["frozen"]["ofm"] < 0.2 * faults["frozen"]["true_ofm"]
    assert faults["frozen"]["fmse"] < 0.1
    assert faults["frozen"]["landmark_drift"] < 0.0045 < faults["frozen"]["true_landmark_drift"]
    assert faults["mouth frozen"]["mouth_range_ratio"] < 0.6
    assert faults["mouth frozen"]["lmd"] > 0.3
    assert faults["mouth frozen"]["landmark_drift"] == pytest.approx(
        faults["mouth frozen"]["true_landmark_drift"], abs=0.005
    )
    assert faults["colour drifts"]["colour_drift"] > faults["colour drifts"]["true_colour_drift"] + 2
    assert faults["colour drifts"]["mouth_correlation"] > 0.95
    assert faults["trembles"]["ofm"] > 3 * faults["trembles"]["true_ofm"]
    assert faults["grows wider"]["identity_shape"] > 1.2 * faults["grows wider"]["true_identity_shape"]
    assert faults["picture 3 frames late"]["mouth_offset_frames"] == pytest.approx(3, abs=0.2)
    assert faults["picture 3 frames late"]["mouth_correlation"] < 0.95
    frozen, wobbles = faults["head frozen"], faults["head wobbles"]
    assert frozen["head_range_y"] < 0.2 * frozen["true_head_range_y"]  # in these frames the head hardly moves otherwise
    assert frozen["head_range"] < 0.7 < 1.5 < wobbles["head_range"]
    for number in ("x", "roll"):
        assert wobbles[f"head_range_{number}"] > 5 * wobbles[f"true_head_range_{number}"], number
        assert wobbles[f"head_speed_{number}"] > 4 * wobbles[f"true_head_speed_{number}"], number
    assert faults["frozen"]["head_range"] < 0.2


def test_the_table_of_faults(degradations: ModuleType) -> None:
    clip = ClipReport("a", {}, {}, Path("a.mp4"), None)
    reports = {
        fault: Report([clip], {"clips": 1, "ssim": value}, {}, [], [], {})
        for fault, value in (("none", 1.0), ("blurred", 0.8361))
    }
    assert degradations.table(reports) == "| measure | none | blurred |\n|---|---|---|\n| SSIM | 1 | 0.836 |"


# ---- What fails, and what differs ----


@pytest.fixture(scope="module")
def folders(small_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Generated and real videos."""
    generated, reference = tmp_path_factory.mktemp("generated"), tmp_path_factory.mktemp("reference")
    real = np.stack(list(islice(read_frames(small_clip), FRAMES)))
    sound = torch.sin(torch.arange(FRAMES * SAMPLE_RATE // FPS) / 20) / 2
    write_clip(generated / "short.mp4", real[:25], sound[:16_000])
    write_clip(reference / "short.mp4", real, sound)
    cut(small_clip, reference / "slow.mp4", 30)
    _at_20_fps(generated / "slow.mp4", real[:30])
    write_clip(generated / "silent.mp4", real[:12], torch.zeros(0))
    write_clip(reference / "silent.mp4", real[:12], sound)
    write_clip(generated / "faceless.mp4", np.full((3, 96, 96, 3), 90, np.uint8), sound)
    write_clip(generated / "unmatched.mp4", real[:3], sound)
    (generated / "broken.mp4").write_text("no video")
    (generated / "notes.txt").write_text("no video either")
    for name in ("faceless", "broken", "not_made"):
        write_clip(reference / f"{name}.mp4", real[:3], sound)
    return generated, reference


def _at_20_fps(path: Path, frames: np.ndarray) -> None:
    seconds = np.arange(len(frames) * 20 // FPS) / 20
    write_video(path, frames[(seconds * FPS).round().astype(int)], None, fps=20)


def test_what_fails_is_listed(networks: None, folders: tuple[Path, Path], tmp_path: Path) -> None:
    generated, reference = folders
    report = evaluate(generated, reference, progress=False)
    rows = {row.clip: row for row in report.clips}
    assert list(rows) == ["short", "silent", "slow"]
    reasons = dict(report.failed)
    assert set(reasons) == {"broken", "faceless", "unmatched"}
    assert "not a video" in reasons["broken"]
    assert reasons["faceless"] == f"{generated / 'faceless.mp4'}: no face in 3 of 3 frames"
    assert reasons["unmatched"] == f"no video of that name in {reference}"
    assert (report.summary["clips"], report.summary["failed"]) == (3, 3)
    assert report.summary["ssim"] == pytest.approx(np.mean([row.values["ssim"] for row in report.clips]))
    # A video without sound lacks only the measures of sound.
    assert "av_offset" in rows["short"].values
    assert not any("av_" in name for name in rows["silent"].values)
    assert rows["silent"].values["ssim"] == pytest.approx(1, abs=0.01)
    # Videos of different lengths and frame rates are compared over the common time.
    assert rows["short"].values["frames"] == 25
    assert rows["short"].values["mouth_correlation"] > 0.98
    assert rows["short"].values["landmark_drift"] == pytest.approx(
        rows["short"].values["true_landmark_drift"], abs=1e-3
    )
    assert rows["slow"].values["frames"] == 30
    assert "1 of 3 clips: not as long as the real one, and compared over the common time (short: 25 and 32 frames)" in (
        report.warnings
    )
    assert any("frame rate" in line and "(slow: 20 and 25)" in line for line in report.warnings)
    assert any(line.startswith("2 of 3 clips: av_offset, av_confidence, av_distance") for line in report.warnings)
    write_report(report, tmp_path)
    assert len(json.loads((tmp_path / "report.json").read_text())["failed"]) == 3


def test_a_limit_takes_the_first_by_name(no_networks: None, folders: tuple[Path, Path]) -> None:
    report = evaluate(*folders, only=["ssim"], limit=4, progress=False)  # broken, faceless, short, silent
    assert [row.clip for row in report.clips] == ["short", "silent"]
    assert (report.summary["clips"], report.summary["failed"]) == (2, 3)


def test_processes_change_no_number(networks: None, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Results arrive in any order; a broken video does not affect the others."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(4):
        shutil.copy(folders[0] / "unmatched.mp4", folder / f"{index}.mp4")
    shutil.copy(folders[0] / "broken.mp4", folder)
    one, two = (evaluate(folder, folder, workers=count, progress=False) for count in (1, 2))
    assert one == two
    assert [row.clip for row in two.clips] == [*"0123"]
    assert [clip for clip, _ in two.failed] == ["broken"]


def test_weights_that_are_not_there_are_named_and_not_fetched(
    no_networks: None, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    short = [folder / "short.mp4" for folder in folders]
    report = evaluate(*short, progress=False, table="crema")
    assert set(report.unavailable) == NOT_PACKAGED
    assert str(tmp_path / "empty" / "syncnet_v2.model") in report.unavailable["av_offset"]
    assert "55 MB" in report.unavailable["av_offset"]
    assert not NOT_PACKAGED & set(report.summary)
    assert report.table == "crema"
    assert not (tmp_path / "empty").exists()


def test_only_what_is_asked_for(no_networks: None, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    short = [folder / "short.mp4" for folder in folders]
    report = evaluate(*short, progress=False, only=["ssim", "ofm"])
    assert set(report.summary) == {"clips", "failed", "frames", "ssim", "ofm", "true_ofm"}
    assert report.unavailable == {}
    with pytest.raises(DheadsError, match="mouth_slope: needs weights with a lip code"):
        evaluate(*short, progress=False, only=["mouth_slope"])
    with pytest.raises(DheadsError, match="needs a lip reader"):
        evaluate(*short, progress=False, only=["wer"])
    with pytest.raises(DheadsError, match="unknown measure 'sim'; did you mean ssim"):
        evaluate(*short, progress=False, only=["sim"])
    with pytest.raises(DheadsError, match="no table 'grid'; the known ones are crema, lrw"):
        evaluate(*short, progress=False, table="grid")

    def refuse(*_: object) -> None:
        raise DheadsError("no network here; put the file there")

    monkeypatch.setattr(instruments, "load_i3d", refuse)
    with pytest.raises(DheadsError, match="put the file there"):
        evaluate(*short, progress=False, only=["fvd"])


def test_nothing_to_compare(folders: tuple[Path, Path], tmp_path: Path) -> None:
    generated, reference = folders
    with pytest.raises(DheadsError, match="none of its 0 videos has the name of one in"):
        evaluate(tmp_path, reference, progress=False)
    with pytest.raises(DheadsError, match="is no folder"):
        evaluate(generated, tmp_path / "absent", progress=False)
    with pytest.raises(DheadsError, match=r"could be measured; .*no face in 3 of 3 frames"):
        evaluate(generated / "faceless.mp4", reference / "faceless.mp4", progress=False)


# ---- Weights, end to end ----


@pytest.fixture(scope="module")
def data(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two people who are not in the training data of the packaged weights, and a damaged clip."""
    root = tmp_path_factory.mktemp("held_out")
    clips = {"a/one.mp4": "grid/other_lbbc2a.mp4", "b/two.mp4": "hdtf/WDA_BobMenendez_000.mp4"}
    clips["c/damaged.mp4"] = clips["a/one.mp4"]
    for name, source in clips.items():
        cut(shared / "data" / source, root / "raw" / name, 12)
    splits = root / "splits.csv"
    with splits.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("clip", "speaker", "split"), *((name, name[0], "test") for name in clips)])
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch, Detector(preset("small"), "cpu"))
        done = dheads("prepare", root / "raw", "--out", root / "data", "--preset", "small", "--splits", splits)
    assert done.exit_code == 0, done.output
    for path in (root / "data" / "clips").rglob("*damaged*"):
        path.write_bytes(b"nothing")
    return root / "data"


def test_the_packaged_weights_are_scored(no_networks: None, data: Path, tmp_path: Path) -> None:
    report = evaluate_weights("small", data, "test", tmp_path, steps=2, limit=1, progress=False, device="cpu")
    assert [row.clip for row in report.clips] == ["a/a_one"]
    first = report.clips[0].generated
    made = first.stat().st_mtime_ns
    raw = data.parent / "raw"
    whole = evaluate_weights("small", data, "test", tmp_path, raw=raw, steps=2, progress=False, device="cpu", slots=2)
    assert first.stat().st_mtime_ns == made  # existing videos are kept
    assert [row.clip for row in whole.clips] == ["a/a_one", "b/b_two"]
    assert [clip for clip, _ in whole.failed] == ["c/c_damaged"]
    moved = {name: value for name, value in whole.clips[0].values.items() if value != report.clips[0].values[name]}
    assert moved.keys() <= {name for name in moved if name.startswith(("true_head_", "head_range", "head_speed"))}
    # Raw clips and those of the dataset, in which heads move, show one motion.
    both = [one.clips[0].values["true_head_range_x"] for one in (report, whole)]
    assert 0.5 < both[1] / both[0] < 2  # both are small, and landmarks tremble
    assert not report.warnings
    assert not whole.warnings
    assert {"mouth_slope", "true_mouth_slope"} <= set(whole.clips[1].values)
    assert whole.summary["frames"] == 12
    assert whole.summary["ssim"] > 0.6
    assert whole.summary["identity_shape"] < 0.1
    assert {"checkpoint_sha256", "steps", "solver", "seed", "split", "torch"} <= set(whole.facts)
    assert whole.facts["steps"] == 2
    assert {"report.json", "clips.csv", "report.html", "settings.json"} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(DheadsError, match=r"made with other settings \(seed\); choose another folder"):
        evaluate_weights("small", data, "test", tmp_path, steps=2, seed=1, progress=False, device="cpu")


def test_videos_are_compared_at_the_size_of_the_truth(
    no_networks: None, untried: None, shared: Path, tmp_path: Path
) -> None:
    cut(shared / "data" / "hdtf" / "WDA_BobMenendez_000.mp4", tmp_path / "raw" / "a" / "one.mp4", 6)
    size = ["--set", "network.image_size=256"]
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch, Detector(override(preset("small"), {"network": {"image_size": 256}}), "cpu"))
        done = dheads("prepare", tmp_path / "raw", "--out", tmp_path / "data", "--preset", "small", *size)
    assert done.exit_code == 0, done.output
    split = Dataset(tmp_path / "data").clips[0].split
    report = evaluate_weights("small", tmp_path / "data", split, tmp_path / "out", progress=False, device="cpu")
    assert report.facts["size"] == 256
    shown, truth = (
        np.stack(list(read_frames(path)))
        for path in (report.clips[0].generated, next(tmp_path.glob("data/clips/*/*.mp4")))
    )
    assert shown.shape == truth.shape == (6, 256, 256, 3)
    assert report.summary["ssim"] > 0.5
    hair = np.s_[:, :50, 60:190]
    sharp = [np.mean([cv2.Laplacian(frame, cv2.CV_64F).var() for frame in frames[hair]]) for frames in (shown, truth)]
    assert 0.6 < sharp[0] / sharp[1] < 1.4, "hair at 128 px, enlarged, would have a fifth"


@pytest.mark.parametrize(("smooth_frames", "warns"), [(5.0, True), (250.0, False)])
def test_an_alignment_that_follows_the_head_is_warned_of(smooth_frames: float, warns: bool) -> None:
    warnings = _still_heads(smooth_frames)
    assert any("hardly moves; give the raw folder (--reference)" in warning for warning in warnings) == warns


def test_speech_has_the_room_noise_of_the_weights(data: Path) -> None:
    """With room noise as in `dheads sample`, or as prepared."""
    config, dataset, device = preset("small"), Dataset(data), torch.device("cpu")
    (clip,) = (clip for clip in dataset.clips if clip.clip == "a/a_one")
    prepared = dataset.labels(clip)["speech"]
    silent = override(config, {"sampling": {"room_noise": 0.0}})
    assert torch.equal(clip_speech(dataset, silent, device, False)(clip), prepared)
    noisy = clip_speech(dataset, config, device, False)(clip)
    waveform = load_waveform(clip_path(data, clip.clip, "mp4"))
    noise = 1e-3 * torch.randn(waveform.shape, generator=torch.Generator().manual_seed(0))
    wanted = load_speech_encoder("whisper-tiny.en", device).encode(waveform + noise, clip.frames)
    torch.testing.assert_close(noisy, wanted)
    assert noisy.shape == prepared.shape
    assert (noisy - prepared).abs().mean() > 0.01


def test_weights_and_data_that_do_not_fit(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DheadsError, match="no moving clip in the split 'val'"):
        evaluate_weights("small", data, "val", tmp_path / "out", progress=False)
    with pytest.raises(DheadsError, match=r"sampling\.steps is 5000"):
        evaluate_weights("small", data, "test", tmp_path / "out", steps=5000, progress=False)
    with pytest.raises(DheadsError, match=r"one\.mp4: is missing, of which .* is made; give the folder"):
        evaluate_weights("small", data, "test", tmp_path / "out", raw=tmp_path, progress=False)
    assert not (tmp_path / "out").exists()
    stray = tmp_path / "stray" / "generated"
    stray.mkdir(parents=True)
    shutil.copy(next(data.rglob("*one.mp4")), stray)
    with pytest.raises(DheadsError, match="holds videos of unknown origin"):
        evaluate_weights("small", data, "test", stray.parent, progress=False)
