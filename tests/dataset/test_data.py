"""The prepared dataset: its pictures and labels, in memory or read by seeking, and errors for damaged clips."""

from __future__ import annotations

import dataclasses
import logging
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from real_data import Prepared
from safetensors.torch import load_file, save_file
from torch import Tensor

from dheads.config import override, preset
from dheads.dataset import dataset as data
from dheads.dataset.dataset import Dataset
from dheads.dataset.manifest import Clip
from dheads.errors import DheadsError
from dheads.extensions.eyes import eye_code
from dheads.extensions.lips import centred
from dheads.faces.alignment import EYES, MOUTH, region_box
from dheads.media.reading import read_frames
from dheads.media.writing import write_clip

pytest_plugins = "real_data"

DAMAGED = "s1/grid_one"


@pytest.fixture(scope="module")
def dataset(prepared: Prepared) -> Dataset:
    return Dataset(prepared.data)


@pytest.fixture
def large(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """The same dataset, as if it were too large for the memory."""
    monkeypatch.setattr(data, "_KEPT_BYTES", 0)
    return Dataset(prepared.data)


@pytest.fixture
def copy(prepared: Prepared, tmp_path: Path) -> Path:
    """A folder whose clips may be damaged."""
    return shutil.copytree(prepared.data, tmp_path / "data")


def named(dataset: Dataset, name: str) -> Clip:
    return next(clip for clip in dataset.clips if clip.clip == name)


# --- Content


def test_clips_and_splits(dataset: Dataset) -> None:
    assert [clip.clip for clip in dataset.split("val")] == ["other/grid_other"]
    assert [clip.clip for clip in dataset.split("train")] == [
        "en/talkvid_en",
        "s1/grid_one",
        "s1/grid_two",
        "still_a/stills_a",
        "still_b/stills_b",
    ]
    assert dataset.split("test") == []
    for clip in dataset.clips:
        labels = dataset.labels(clip)
        assert {name: (tuple(label.shape), label.dtype) for name, label in labels.items()} == {
            "speech": ((clip.frames, 384), torch.float32),
            "landmarks": ((clip.frames, 68, 2), torch.float32),
            "mouth_box": ((clip.frames, 4), torch.float32),
            "lips": ((clip.frames, 3), torch.float32),
            "eyes": ((clip.frames,), torch.float32),
            "lips_code": ((clip.frames, 3), torch.float32),
            "lips_box": ((clip.frames, 4), torch.float32),
            "pose": ((clip.frames, 6), torch.float32),
            "pose_code": ((clip.frames, 6), torch.float32),
            "pose_box": ((clip.frames, 4), torch.float32),
            "eyes_code": ((clip.frames, 1), torch.float32),
            "eyes_box": ((clip.frames, 4), torch.float32),
            "speech_at_tempos": ((int(clip.frames > 1), clip.frames, 384), torch.float32),
        }
        assert torch.equal(labels["lips_code"], centred(labels["lips"]))
        assert torch.equal(labels["eyes_code"], eye_code(labels["eyes"]))
        landmarks = labels["landmarks"].numpy()
        for code, points in (("eyes", np.concatenate(EYES)), ("lips", MOUTH)):
            assert torch.equal(labels[f"{code}_box"], torch.from_numpy(region_box(landmarks, points, 32)).float())


def test_frames_are_those_of_the_video(dataset: Dataset, large: Dataset) -> None:
    for clip in dataset.clips:
        shown = np.stack(list(read_frames(dataset.root / "clips" / f"{clip.clip}.mp4")))
        assert shown.shape == (clip.frames, 32, 32, 3)
        assert np.array_equal(dataset.frames(clip), shown)
        assert np.array_equal(large.frames(clip), shown)


def test_tags_in_another_encoding_do_no_harm(copy: Path) -> None:
    path = copy / "clips" / f"{DAMAGED}.mp4"
    tagged = path.read_bytes()
    assert tagged.count(b"Prepared clip") == 1
    path.write_bytes(tagged.replace(b"Prepared clip", b"Pr\xe9par\xe9e clip"))
    dataset = Dataset(copy)
    clip = named(dataset, DAMAGED)
    assert np.array_equal(dataset.frames(clip), np.stack(list(read_frames(path))))


def test_any_pictures_in_any_order_are_those_of_the_whole_clip(dataset: Dataset, large: Dataset) -> None:
    rng = np.random.default_rng(0)
    for clip in dataset.clips:
        every = range(clip.frames)
        choices = [[clip.frames - 1], list(every), list(reversed(every)), list(rng.integers(clip.frames, size=6))]
        for indices in choices:
            wanted = dataset.frames(clip)[indices]
            assert np.array_equal(large.pictures(clip, indices), wanted)
            assert np.array_equal(dataset.pictures(clip, indices), wanted)


def test_a_small_dataset_is_read_once_and_a_large_one_every_time(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Dataset(copy)
    monkeypatch.setattr(data, "_KEPT_BYTES", 100 * 3 * 32**2)  # too few for 100 frames and their labels
    large = Dataset(copy)
    clip = named(small, DAMAGED)
    kept = small.frames(clip), small.labels(clip)
    large.frames(clip), large.labels(clip)
    shutil.rmtree(copy / "clips")
    assert small.frames(clip) is kept[0]
    assert small.labels(clip) is kept[1]
    assert np.array_equal(small.pictures(clip, [3, 1]), kept[0][[3, 1]])
    for read in (large.frames, large.labels, lambda clip: large.pictures(clip, [0])):
        with pytest.raises(DheadsError, match=r"grid_one\.\w+: cannot be read .*prepare the data again"):
            read(clip)


def test_threads_may_read_together(dataset: Dataset, large: Dataset) -> None:
    clips = [clip for clip in dataset.clips if clip.frames > 1] * 8
    with ThreadPoolExecutor(4) as pool:
        for read in (large, Dataset(dataset.root)):
            pictures = list(pool.map(lambda clip, read=read: read.pictures(clip, [7, 3, 2]), clips))
            assert all(np.array_equal(p, dataset.frames(c)[[7, 3, 2]]) for p, c in zip(pictures, clips, strict=True))


# --- Talks


def test_lip_clips_are_clips_that_move(dataset: Dataset) -> None:
    clips = dataset.lip_clips("train")
    assert [clip.speaker for clip in clips] == ["en", "en", "s1", "s1", "s1", "s1"], "each at two tempos"
    assert [tuple(clip.speech.shape) for clip in clips[::2]] == [(31, 384), (25, 384), (25, 384)]
    assert [tuple(clip.measures.shape) for clip in clips[::2]] == [(31, 3), (25, 3), (25, 3)]
    for clip, other in zip(clips[::2], clips[1::2], strict=True):
        assert torch.equal(other.measures, clip.measures)
        assert 0.2 < float((other.speech - clip.speech).std()) < 1, "the same words in another voice"
        assert clip.measures[:, 1:].median(dim=0).values.abs().max() < 1e-6
    assert dataset.lip_clips("test") == []


def test_lip_clips_of_many_are_some_of_them(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_MAX_FITTED", 2)
    first, _, last, _ = dataset.lip_clips("train")
    assert torch.equal(first.speech, dataset.labels(named(dataset, "en/talkvid_en"))["speech"])
    assert torch.equal(last.speech, dataset.labels(named(dataset, "s1/grid_two"))["speech"])


def test_lip_clips_leave_out_what_cannot_be_read(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "clips" / f"{DAMAGED}.safetensors").unlink()
    assert [clip.speaker for clip in Dataset(copy).lip_clips("train")[::2]] == ["en", "s1"]
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("dheads", logging.WARNING)
    assert "grid_one.safetensors: cannot be read" in record.getMessage()


# --- Other folders


def test_a_dataset_made_for_another_network_is_refused(dataset: Dataset) -> None:
    dataset.check(preset("tiny"))
    with pytest.raises(DheadsError, match=r"size = 32, but the configuration wants 128; prepare the data"):
        dataset.check(preset("small"))
    other = override(preset("tiny"), {"alignment": {"eye_distance": 0.3}})
    with pytest.raises(DheadsError, match="prepared with alignment"):
        dataset.check(other)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"format = 99\n", "format 99 is not the known one, 2; prepare the data again"),
        (b"format = \xff\n", r"dataset\.toml: cannot be read .*; prepare the data again"),
        (b"format = 2\n", "size None is no number of pixels; prepare the data again"),
        (b"format = 2\nsize = true\n", "size True is no number of pixels"),
        (b"format = 2\nsize = -32\n", "size -32 is no number of pixels"),
        (b"format = 2\nsize = 32\n", "alignment must be a table, not None; prepare the data again"),
        (b"format = 2\nsize = 32\n[alignment]\nodd = 1\n", r"dataset\.toml: .*unknown key alignment\.odd"),
        (b"format = 2\nsize = 32\n[alignment]\neye_distance = 0\n", r"dataset\.toml: .*alignment\.eye_distance"),
    ],
)
def test_a_damaged_description_is_refused(copy: Path, content: bytes, reason: str) -> None:
    (copy / "dataset.toml").write_bytes(content)
    with pytest.raises(DheadsError, match=reason):
        Dataset(copy)


def test_a_folder_that_is_no_dataset(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(DheadsError, match=r"is no prepared dataset \(no dataset\.toml\); run dheads prepare first"):
        Dataset(tmp_path)
    (copy / "clips.csv").write_text("clip,speaker,split,frames,source\n../../secret,s1,train,3,x.mp4\n")
    with pytest.raises(DheadsError, match=r"clips\.csv: .*secret' is not a valid clip"):
        Dataset(copy)


# --- Damaged clips


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeros_at_the_end(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-4000] + bytes(4000))


def of_another_size(path: Path) -> None:
    write_clip(path, [np.zeros((64, 32, 3), np.uint8)] * 25, torch.zeros(16_000))


def of_another_length(path: Path) -> None:
    write_clip(path, [np.zeros((32, 32, 3), np.uint8)] * 24, torch.zeros(16_000))


def of_an_unknown_codec(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))


def text(path: Path) -> None:
    path.write_text("no clip")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "cannot be read"),
        (folder, "cannot be read"),
        (text, "cannot be read"),
        (half, r"(cannot be read|frame \d+ is damaged)"),
        (zeros_at_the_end, r"(cannot be read|frame \d+ is damaged)"),
        (of_another_size, "is of 32 x 64 px instead of 32 x 32"),
        (of_another_length, "holds 24 frames instead of 25"),
        (of_an_unknown_codec, "holds no video"),
    ],
)
@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_damaged_videos_are_named(
    copy: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], reason: str, kept_bytes: int
) -> None:
    monkeypatch.setattr(data, "_KEPT_BYTES", kept_bytes)
    dataset = Dataset(copy)
    damage(copy / "clips" / f"{DAMAGED}.mp4")
    message = rf"grid_one\.mp4: {reason}.*; prepare the data again"
    with pytest.raises(DheadsError, match=message):
        dataset.frames(named(dataset, DAMAGED))
    with pytest.raises(DheadsError, match=message):
        dataset.pictures(named(dataset, DAMAGED), [0, 24])


def test_a_table_that_promises_more_frames_is_contradicted(dataset: Dataset, large: Dataset) -> None:
    clip = dataclasses.replace(named(dataset, "s1/grid_two"), frames=26)
    for opened in (Dataset(dataset.root), large):
        with pytest.raises(DheadsError, match=r"grid_two\.mp4: holds 25 frames instead of 26"):
            opened.frames(clip)
        with pytest.raises(DheadsError, match=r"grid_two\.safetensors: speech is of shape \(25, 384\), for 26 frames"):
            opened.labels(clip)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        labels = load_file(path)
        save_file({**labels, name: change(labels[name]).contiguous()}, path)

    return damage


def without(name: str) -> Callable[[Path], None]:
    return lambda path: save_file({key: label for key, label in load_file(path).items() if key != name}, path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "cannot be read"),
        (folder, "cannot be read"),
        (text, "cannot be read"),
        (half, "cannot be read"),
        (without("lips"), r"cannot be read \('lips'\)"),
        (changed("speech", lambda x: x[:20]), r"speech is of shape \(20, 384\), for 25 frames"),
        (changed("speech", lambda x: x[:, 0]), r"speech is of shape \(25,\), for 25 frames"),
        (changed("landmarks", lambda x: x[:, :60]), r"landmarks is of shape \(25, 60, 2\)"),
        (changed("mouth_box", lambda x: x[:, :3]), r"mouth_box is of shape \(25, 3\)"),
        (changed("lips", lambda x: x[:, :, None]), r"lips is of shape \(25, 3, 1\)"),
        (changed("speech", lambda x: x.index_fill(0, torch.tensor(3), torch.nan)), "speech holds numbers that are not"),
        (
            changed("speech_at_tempos", lambda x: x[:, 1:]),
            r"speech_at_tempos is of shape \(1, 24, 384\), or not finite",
        ),
        (changed("speech_at_tempos", lambda x: x / 0), "speech_at_tempos is of shape .*, or not finite"),
        (changed("mouth_box", lambda x: x + 20), "mouth_box lies outside the picture"),
        (changed("mouth_box", lambda x: x.flip(1)), "mouth_box lies outside the picture"),
    ],
)
def test_damaged_labels_are_named(copy: Path, damage: Callable[[Path], None], reason: str) -> None:
    dataset = Dataset(copy)
    damage(copy / "clips" / f"{DAMAGED}.safetensors")
    with pytest.raises(DheadsError, match=rf"grid_one\.safetensors: {reason}.*; prepare the data again"):
        dataset.labels(named(dataset, DAMAGED))


@pytest.mark.parametrize("ending", ["mp4", "safetensors"])
def test_whatever_is_damaged_is_either_read_or_named(copy: Path, ending: str) -> None:
    rng = random.Random(0)
    path = copy / "clips" / f"{DAMAGED}.{ending}"
    content = path.read_bytes()
    messages = []
    for _ in range(120):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 10, 100])):
            damaged[rng.randrange(rng.choice([3000, len(damaged)]))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        dataset = Dataset(copy)
        clip = named(dataset, DAMAGED)
        try:
            (dataset.frames if ending == "mp4" else dataset.labels)(clip)
        except DheadsError as error:
            messages.append(str(error))
    assert len(messages) > 60
    assert all(f"grid_one.{ending}: " in message for message in messages)
