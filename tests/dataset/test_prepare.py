"""`dheads prepare` on real clips: the files that it writes, the clips that it leaves out, and a second run."""

from __future__ import annotations

import csv
import json
import shutil
import tomllib
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pillow_heif import from_pillow
from real_data import CUTS, UNLISTED, WHOLE, Prepared, cut, decoded, dheads, prepare_command, sound_seconds, write_wav
from safetensors.torch import load_file

from dheads.config import preset
from dheads.dataset import prepare
from dheads.dataset.clip_worker import Finished
from dheads.dataset.extraction import Detector
from dheads.dataset.sources import Source
from dheads.faces import alignment as faces
from dheads.faces.landmarks import load_backend
from dheads.media.reading import read_frames
from dheads.media.sound import load_waveform
from dheads.media.writing import write_video
from dheads.speech.encoders import load_speech_encoder
from dheads.speech.sync import Sync
from dheads.system.workers import Died

pytest_plugins = "real_data"

TINY = preset("tiny")
DIRTY = "grid/dirty.mp4"
DIED = "its worker process died (a crash of the decoder, or out of memory)"
VIDEOS = {  # their rows of clips.csv
    "s1/grid_one": ("s1", "train", 25, "grid/one.mp4"),
    "s1/grid_two": ("s1", "train", 25, "grid/two.mp4"),
    "en/talkvid_en": ("en", "train", 31, "talkvid/en.mp4"),  # 30 frames at 24 fps: 1.25 s
    "other/grid_other": ("other", "val", 20, "grid/other.mp4"),
}
PHOTOS = {
    "still_a/stills_a": ("still_a", "train", 1, "stills/a.jpg"),
    "still_b/stills_b": ("still_b", "train", 1, "stills/b.jpg"),
}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def labels_of(prepared: Prepared, clip: str) -> dict[str, torch.Tensor]:
    return load_file(prepared.data / "clips" / f"{clip}.safetensors")


# --- The whole folder


def test_the_command_prints_a_summary(prepared: Prepared) -> None:
    assert prepared.done.exit_code == 0, prepared.done.stderr
    assert prepared.done.stdout == f"{prepared.data}\n"
    assert "6 clips, 0.00 hours, 103 frames, 5 speakers\n" in prepared.done.stderr
    assert f"left out {DIRTY}: no face in 12 of 75 frames\n" in prepared.done.stderr
    assert prepared.done.stderr.endswith(f"look at {prepared.data / 'contact-sheet.png'}\n")


def test_clips_csv(prepared: Prepared) -> None:
    rows = read_csv(prepared.data / "clips.csv")
    found = {row["clip"]: (row["speaker"], row["split"], int(row["frames"]), row["source"]) for row in rows}
    assert found == VIDEOS | PHOTOS
    assert list(rows[0]) == ["clip", "speaker", "split", "frames", "source", "offset_ms", "sync"]
    assert {row["offset_ms"] for row in rows} == {""}  # shorter than 70 frames
    assert [row["clip"] for row in rows] == sorted(found)


def test_frames_are_seconds_times_25(prepared: Prepared) -> None:
    for _, _, frames, source in VIDEOS.values():
        with av.open(str(prepared.raw / source)) as container:
            stream = container.streams.video[0]
            assert stream.average_rate == (24 if source.startswith("talkvid") else 25)
            assert frames == round(float(stream.duration * stream.time_base) * 25)


def test_failed_csv_has_the_dirty_clip_with_its_reason(prepared: Prepared) -> None:
    failed = [{"source": DIRTY, "reason": "no face in 12 of 75 frames"}]
    assert read_csv(prepared.data / "failed.csv") == failed
    assert not list(prepared.data.rglob("*dirty*"))


def test_files_that_the_splits_do_not_name_are_left_alone(prepared: Prepared) -> None:
    assert (prepared.raw / UNLISTED).is_file()
    assert len(list(prepared.data.rglob("*.mp4"))) == len(CUTS) + len(WHOLE) - 1
    assert not list(prepared.data.rglob("*unlisted*"))


def test_dataset_toml_describes_the_preparation(prepared: Prepared) -> None:
    info = tomllib.loads((prepared.data / "dataset.toml").read_text(encoding="utf-8"))
    assert (info["format"], info["size"], info["fps"]) == (2, 32, 25)
    assert info["speech_encoder"] == "whisper-tiny.en"
    assert (info["layout"], info["preset"]) == ("folder", "tiny")
    assert info["alignment"] == asdict(TINY.alignment)
    assert info["preparation"] == asdict(TINY.preparation) | {"speech_tempos": [1.1]}
    assert "licence" in info["licence_note"]


def test_nothing_else_is_left_behind(prepared: Prepared) -> None:
    top = {path.name for path in prepared.data.iterdir()}
    assert top == {"clips", "clips.csv", "failed.csv", "dataset.toml", "contact-sheet.png"}
    files = {path.relative_to(prepared.data / "clips").as_posix() for path in prepared.data.rglob("clips/*/*")}
    assert files == {f"{clip}.{ending}" for clip in VIDEOS | PHOTOS for ending in ("mp4", "safetensors")}


# --- One clip


@pytest.mark.parametrize("clip", [*VIDEOS, *PHOTOS])
def test_labels(prepared: Prepared, clip: str) -> None:
    frames = (VIDEOS | PHOTOS)[clip][2]
    labels = labels_of(prepared, clip)
    tempos = {} if clip in PHOTOS else {"speech_at_tempos": ((1, frames, 384), torch.float16)}
    kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in labels.items()}
    assert kinds == {
        "speech": ((frames, 384), torch.float16),
        "landmarks": ((frames, 68, 2), torch.float32),
        "mouth_box": ((frames, 4), torch.int32),
        "lips": ((frames, 3), torch.float32),
        "eyes": ((frames,), torch.float32),
        **tempos,
    }
    assert all(tensor.isfinite().all() for tensor in labels.values())


@pytest.mark.parametrize("clip", [*VIDEOS, *PHOTOS])
def test_clips_play_and_have_their_sound(prepared: Prepared, clip: str) -> None:
    frames = (VIDEOS | PHOTOS)[clip][2]
    path = prepared.data / "clips" / f"{clip}.mp4"
    with av.open(str(path)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert (video.width, video.height, video.average_rate) == (32, 32, 25)
        assert sound.rate == 16_000
        assert sound.channels == 1
        assert all(packet.is_keyframe for packet in container.demux(video) if packet.size)
    assert decoded(path).shape == (frames, 32, 32, 3)
    assert sound_seconds(path) == pytest.approx(frames / 25, abs=0.02)


@pytest.mark.parametrize("clip", [*VIDEOS, *PHOTOS])
def test_the_mouth_box_holds_the_mouth(prepared: Prepared, clip: str) -> None:
    labels = labels_of(prepared, clip)
    x0, y0, x1, y1 = labels["mouth_box"].unbind(1)
    assert (x0 >= 0).all()
    assert (x0 < x1).all()
    assert (x1 <= 32).all()
    assert (y0 >= 0).all()
    assert (y0 < y1).all()
    assert (y1 <= 32).all()
    x, y = labels["landmarks"][:, 48:68].unbind(2)  # (F, 20)
    # Pixel i reaches from i - 0.5 to i + 0.5.
    assert ((x >= x0[:, None] - 0.5) & (x <= x1[:, None] - 0.5)).all()
    assert ((y >= y0[:, None] - 0.5) & (y <= y1[:, None] - 0.5)).all()
    assert (x1 - x0 < 24).all(), "a mouth, not the whole face"
    assert (y1 - y0 < 20).all()


@pytest.mark.parametrize("clip", [*VIDEOS, *PHOTOS])
def test_faces_lie_on_the_mean_face(prepared: Prepared, clip: str) -> None:
    landmarks = labels_of(prepared, clip)["landmarks"].numpy()
    mean = faces.mean_face(TINY.alignment, 32)
    for eye in faces.EYES:
        distance = np.linalg.norm(landmarks[:, eye].mean(axis=1) - mean[eye].mean(axis=0), axis=1)
        assert distance.max() < 0.06 * 32
    assert np.abs(landmarks[:, faces.MOUTH].mean(axis=1)[:, 0] - 15.5).max() < 0.15 * 32


def test_pictures_agree_with_the_landmarks(prepared: Prepared) -> None:
    """The stored landmarks and pictures are the raw clip's landmarks, detected again, and frames, both aligned."""
    raw = decoded(prepared.raw / "grid/one.mp4")
    found = load_backend("mesh").track(raw)
    matrices = faces.align_transforms(found, TINY.alignment, 32)
    labels = labels_of(prepared, "s1/grid_one")
    stored = decoded(prepared.data / "clips" / "s1" / "grid_one.mp4")
    for k, frame in enumerate(raw[:5]):
        wanted = faces.apply_transform(matrices[k], found[k])
        np.testing.assert_allclose(labels["landmarks"][k], wanted, atol=0.05)
        # Luma, because colour is stored at half the resolution.
        luma, wanted = (x @ (0.2126, 0.7152, 0.0722) for x in (stored[k], faces.warp(frame, matrices[k], 32)))
        assert np.abs((luma - wanted).mean()) < 1
        assert np.abs(luma - wanted).mean() < 0.25 * np.abs(luma - np.roll(wanted, 1, axis=1)).mean()


def test_speech_is_that_of_the_raw_clip(prepared: Prepared) -> None:
    waveform = load_waveform(prepared.raw / "grid/other.mp4")
    speech = load_speech_encoder("whisper-tiny.en").encode(waveform[: 20 * 640], 20)
    torch.testing.assert_close(labels_of(prepared, "other/grid_other")["speech"].float(), speech, rtol=0, atol=0.02)
    voice = load_speech_encoder("whisper-tiny.en").encode_at(1.1, waveform[: 20 * 640], 20)
    torch.testing.assert_close(
        labels_of(prepared, "other/grid_other")["speech_at_tempos"][0].float(), voice, rtol=0, atol=0.02
    )
    stored = load_waveform(prepared.data / "clips" / "other" / "grid_other.mp4")
    torch.testing.assert_close(stored[: 20 * 640], waveform[: 20 * 640], rtol=0, atol=2 / 32768)


def test_lips_are_measured_on_the_landmarks(prepared: Prepared) -> None:
    labels = labels_of(prepared, "s1/grid_two")
    landmarks = labels["landmarks"].numpy()
    wanted = [faces.mouth_opening(landmarks), faces.mouth_width(landmarks), faces.lip_thickness(landmarks)]
    np.testing.assert_allclose(labels["lips"].numpy(), np.stack(wanted, axis=1), atol=1e-6)
    assert labels["lips"][:, 0].max() - labels["lips"][:, 0].min() > 0.03, "somebody is speaking"
    assert (labels["lips"][:, 1:] > 0).all()


def test_the_contact_sheet_shows_the_middle_frames(prepared: Prepared) -> None:
    sheet = np.asarray(Image.open(prepared.data / "contact-sheet.png").convert("RGB"))
    assert sheet.shape == (140, 6 * 128, 3), "one row of six, with their captions"
    for k, (clip, (_, _, frames, _)) in enumerate(sorted((VIDEOS | PHOTOS).items())):
        tile = sheet[:128, k * 128 : (k + 1) * 128]
        frame = Image.fromarray(list(read_frames(prepared.data / "clips" / f"{clip}.mp4"))[frames // 2])
        shown = np.asarray(frame.resize((128, 128), Image.Resampling.LANCZOS))
        box = labels_of(prepared, clip)["mouth_box"][frames // 2]
        x0, y0, x1, y1 = (4 * box).tolist()
        outline = np.zeros((128, 128), bool)
        outline[y0:y1, x0:x1] = True
        outline[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = False
        assert (tile[outline] == (0, 255, 0)).all()
        assert (tile[~outline] == shown[~outline]).all()
        assert sheet[128:, k * 128 : (k + 1) * 128].max() > 200, "its name"


# --- A second run


def test_a_second_run_keeps_what_is_there(prepared: Prepared, tmp_path: Path, tried: list[str]) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared.data, data)  # copies the times of modification too
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (data / "clips").rglob("*.*")}
    tables = {name: (data / name).read_bytes() for name in ("clips.csv", "failed.csv", "dataset.toml")}
    missing = data / "clips" / "still_a" / "stills_a.safetensors"
    missing.unlink()  # as if the run had been killed there
    done = prepare_command(prepared.raw, prepared.splits, data)
    assert done.exit_code == 0, done.stderr
    assert tried == ["stills/a.jpg"]
    assert {name: (data / name).read_bytes() for name in tables} == tables
    redone = {missing, missing.with_suffix(".mp4")}
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (data / "clips").rglob("*.*")}
    assert after.keys() == before.keys()
    for path in before.keys() - redone:
        assert after[path] == before[path]
    assert after[missing][0] == before[missing][0]


def test_a_folder_of_another_configuration_is_refused(prepared: Prepared) -> None:
    done = dheads("prepare", prepared.raw, "--out", prepared.data, "--preset", "small", "--splits", prepared.splits)
    assert done.exit_code == 1
    assert done.stderr == (
        f"error: {prepared.data}: holds clips prepared with size = 32, not 128; choose another --out\n"
    )
    assert "size = 32" in (prepared.data / "dataset.toml").read_text(encoding="utf-8")


# --- What cannot be used


def test_nothing_usable(shared: Path, tmp_path: Path, tried: list[str]) -> None:
    """A clip without sound, a picture without a face and a file that is not a video: each has its reason."""
    raw = tmp_path / "raw"
    cut(shared / "data" / "grid" / "s1_bbal7s.mp4", raw / "a" / "short.mp4", 10)
    with av.open(str(raw / "a" / "short.mp4")) as short, av.open(str(raw / "a" / "silent.mp4"), "w") as target:
        given = short.streams.video[0]
        video = target.add_stream_from_template(given)
        for packet in short.demux(given):
            if packet.size:
                packet.stream = video
                target.mux(packet)
    (raw / "a" / "short.mp4").unlink()
    Image.new("RGB", (64, 64), "gray").save(raw / "wall.png")
    (raw / "text.mp4").write_text("no video", encoding="utf-8")
    done = dheads("prepare", raw, "--out", tmp_path / "data", "--preset", "tiny", "--workers", 1, "--quiet")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {raw}: none of its 3 files could be prepared; ")
    assert done.stderr.count("\n") == 1
    reasons = {row["source"]: row["reason"] for row in read_csv(tmp_path / "data" / "failed.csv")}
    assert "no sound stream" in reasons["a/silent.mp4"]
    assert "no face found" in reasons["wall.png"]
    assert "not a" in reasons["text.mp4"]


# --- Pictures of phones and old cameras


def crops(detector: Detector, raw: Path, name: str) -> np.ndarray:
    """(F, S, S, 3): the aligned frames of a file."""
    return np.stack([frame for frame, _ in detector(raw, Source(name, "a/a", "a", "train")).frames]).astype(int)


def test_a_heic_photo_gives_what_a_jpeg_does(detector: Detector, shared: Path, tmp_path: Path) -> None:
    with Image.open(shared / "data" / "stills" / "001.jpg") as photo:
        photo.save(tmp_path / "a.png")
        from_pillow(photo).save(tmp_path / "a.heic", quality=95)
    assert np.abs(crops(detector, tmp_path, "a.heic") - crops(detector, tmp_path, "a.png")).mean() < 3


def write_wide(path: Path, frames: list[np.ndarray], waveform: torch.Tensor) -> None:
    """A video whose pixels are twice as wide as they are high."""
    with av.open(str(path), "w") as target:
        video = target.add_stream("libx264", rate=25, options={"crf": "4"})
        video.height, video.width = frames[0].shape[:2]
        video.codec_context.sample_aspect_ratio = 2
        audio = target.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for frame in frames:
            target.mux(video.encode(av.VideoFrame.from_ndarray(frame)))
        samples = (waveform * 32767).short().numpy()
        sound = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        sound.sample_rate = 16_000
        target.mux(audio.encode(sound))
        target.mux([*video.encode(), *audio.encode()])


def test_a_clip_upside_down_or_squeezed_gives_what_the_clip_does(
    detector: Detector, shared: Path, tmp_path: Path
) -> None:
    source = shared / "data" / "talkvid" / "Gender_male_1.mp4"
    frames = list(islice(read_frames(source), 10))
    write_wav(tmp_path / "a.wav", load_waveform(source)[:6400])
    turned = [np.ascontiguousarray(frame[::-1, ::-1]) for frame in frames]
    squeezed = [cv2.resize(frame, (128, 256), interpolation=cv2.INTER_AREA) for frame in frames]
    write_video(tmp_path / "plain.mp4", frames, tmp_path / "a.wav")
    write_video(tmp_path / "turned.mp4", turned, tmp_path / "a.wav")
    write_wide(tmp_path / "wide.mov", squeezed, load_waveform(source)[:6400])
    plain = crops(detector, tmp_path, "plain.mp4")
    assert len(plain) == 10
    for name, allowed in (("turned.mp4", 4), ("wide.mov", 6)):
        assert np.abs(crops(detector, tmp_path, name) - plain).mean() < allowed, name


def test_an_encoder_of_another_size_than_configured(prepared: Prepared, tmp_path: Path) -> None:
    changes = ["--preset", "tiny", "--set", "conditioning.speech_dim=256", "--workers", 1, "--quiet"]
    done = dheads("prepare", prepared.raw, "--out", tmp_path / "data", *changes)
    assert done.exit_code == 1
    assert done.stderr == (
        "error: the speech encoder 'whisper-tiny.en' gives 384 numbers a frame, not 256; "
        "set conditioning.speech_dim=384\n"
    )


def test_missing_raw_folder_and_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.png").touch()
    (tmp_path / "file").touch()
    done = dheads("prepare", tmp_path / "raw", "--out", tmp_path / "file", "--preset", "tiny")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: cannot write {tmp_path / 'file'}: ")


def test_the_result_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = {
        "ann/1.mp4": Finished(50, None),
        "ann/2.mp4": Finished(25, Sync(0.05, 0.7)),
        "bob/1.mp4": "no face in 3 of 8 frames",
        "cy.jpg": Died,
    }
    monkeypatch.setattr(prepare, "run", lambda start, todo, count: ((s, results[s.name]) for s in todo))
    monkeypatch.setattr(prepare, "write_contact_sheet", lambda out, clips, path: path)
    for name in results:
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).touch()
    done = dheads("prepare", tmp_path / "raw", "--out", tmp_path / "data", "--preset", "tiny", "--json", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout) == {
        "clips": 2,
        "frames": 75,
        "seconds": 3.0,
        "speakers": 1,
        "layout": "folder",
        "path": str(tmp_path / "data"),
        "contact_sheet": str(tmp_path / "data" / "contact-sheet.png"),
        "failed": [["bob/1.mp4", "no face in 3 of 8 frames"], ["cy.jpg", DIED]],
        "drops": {"no face in N of N frames": 1, DIED: 1},
        "passed_over": {},
    }
    assert [(row["offset_ms"], row["sync"]) for row in read_csv(tmp_path / "data" / "clips.csv")] == [
        ("", ""),
        ("50.0", "0.7"),
    ]
