"""Batches drawn from a prepared dataset, and their augmentation."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from real_data import Prepared
from torch import Tensor

from dheads import data
from dheads.augment import augment, drift
from dheads.conditioning import window
from dheads.config import override, preset
from dheads.data import Batch, Clip, Dataset, draw_batch
from dheads.errors import DheadsError
from dheads.lips import centred
from dheads.video import to_uint8

pytest_plugins = "real_data"

PLAIN = override(preset("tiny"), {"training": {"augment": False, "batch_size": 64}})


@pytest.fixture(scope="module")
def dataset(prepared: Prepared) -> Dataset:
    return Dataset(prepared.data)


# --- The dataset


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
        assert dataset.frames(clip).shape == (clip.frames, 32, 32, 3)
        assert dataset.frames(clip) is dataset.frames(clip), "kept in memory"
        assert {len(label) for label in dataset.labels(clip).values()} == {clip.frames}


def test_talks_are_of_clips_that_move(dataset: Dataset) -> None:
    talks = dataset.talks("train")
    assert [talk.speaker for talk in talks] == ["en", "s1", "s1"]
    assert [tuple(talk.speech.shape) for talk in talks] == [(31, 384), (25, 384), (25, 384)]
    assert [tuple(talk.measures.shape) for talk in talks] == [(31, 3), (25, 3), (25, 3)]
    for talk in talks:
        assert talk.measures[:, 1:].median(dim=0).values.abs().max() < 1e-6


def test_a_dataset_made_for_another_network_is_refused(dataset: Dataset) -> None:
    dataset.check(preset("tiny"))
    with pytest.raises(DheadsError, match=r"prepared with size = 32, but the configuration wants 96; prepare the data"):
        dataset.check(preset("small"))
    other = override(preset("tiny"), {"alignment": {"eye_distance": 0.3}})
    with pytest.raises(DheadsError, match="prepared with alignment"):
        dataset.check(other)


def test_a_folder_that_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DheadsError, match=r"is no prepared dataset \(no dataset\.toml\); run dheads prepare first"):
        Dataset(tmp_path)
    (tmp_path / "dataset.toml").write_text("format = 99\n", encoding="utf-8")
    with pytest.raises(DheadsError, match="format 99 is not the known one, 1"):
        Dataset(tmp_path)
    (tmp_path / "dataset.toml").write_bytes(b"format = \xff\n")
    with pytest.raises(DheadsError, match=r"dataset\.toml: cannot be read"):
        Dataset(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        "../../secret,s1,train,3,x.mp4",
        "s1/../../secret,s1,train,3,x.mp4",
        "/etc/secret,s1,train,3,x.mp4",
        "s1/one,s1,train,0,x.mp4",
        "s1/one,s1,train,-4,x.mp4",
        "s1/one,s1,train,many,x.mp4",
        "s1/one",
    ],
)
def test_hostile_lists_of_clips_are_refused(prepared: Prepared, tmp_path: Path, row: str) -> None:
    shutil.copy(prepared.data / "dataset.toml", tmp_path)
    (tmp_path / "clips.csv").write_text(f"clip,speaker,split,frames,source\n{row}\n", encoding="utf-8")
    with pytest.raises(DheadsError, match=r"clips\.csv: .*; prepare the data again"):
        Dataset(tmp_path)


def test_a_list_without_a_column_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    shutil.copy(prepared.data / "dataset.toml", tmp_path)
    (tmp_path / "clips.csv").write_text("clip,speaker\na/b,a\n", encoding="utf-8")
    with pytest.raises(DheadsError, match=r"clips\.csv: cannot be read \('split'\)"):
        Dataset(tmp_path)


def test_damaged_clips_are_named(prepared: Prepared, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(prepared.data, copy)
    dataset = Dataset(copy)
    clip = next(clip for clip in dataset.clips if clip.clip == "s1/grid_one")
    labels = copy / "clips" / "s1" / "grid_one.safetensors"
    labels.write_bytes(labels.read_bytes()[:500])
    with pytest.raises(DheadsError, match=r"grid_one\.safetensors: cannot be read"):
        dataset.labels(clip)
    labels.unlink()
    with pytest.raises(DheadsError, match=r"grid_one\.safetensors: cannot be read"):
        dataset.labels(clip)
    with pytest.raises(DheadsError, match=r"grid_one\.mp4: holds 25 frames instead of 26"):
        dataset.frames(dataclasses.replace(clip, frames=26))


# --- Batches


def same(a: Batch, b: Batch) -> bool:
    tensors = [field.name for field in dataclasses.fields(Batch) if field.name != "clips"]
    return a.clips == b.clips and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


@pytest.mark.parametrize("augmented", [False, True])
def test_a_batch_is_a_function_of_seed_and_step(dataset: Dataset, prepared: Prepared, augmented: bool) -> None:
    config = override(preset("tiny"), {"training": {"augment": augmented}})
    clips = dataset.split("train")
    batch = draw_batch(dataset, clips, config, 7)
    draw_batch(dataset, clips, config, 8)
    torch.manual_seed(5)
    assert same(batch, draw_batch(dataset, clips, config, 7))
    assert same(batch, draw_batch(Dataset(prepared.data), clips, config, 7)), "the same from a folder just opened"
    assert not same(batch, draw_batch(dataset, clips, config, 8))
    assert not same(batch, draw_batch(dataset, clips, override(config, {"training": {"seed": 1}}), 7))


def test_a_batch_holds_what_the_clips_hold(dataset: Dataset) -> None:
    """Each example is a frame, those before it (the identity where there is none), and that frame's sound and mouth."""
    batch = draw_batch(dataset, dataset.split("train"), PLAIN, 0)
    by_name = {clip.clip: clip for clip in dataset.clips}
    at_the_start = 0
    for i, name in enumerate(batch.clips):
        frames, labels = dataset.frames(by_name[name]), dataset.labels(by_name[name])

        def shows(picture: Tensor, frames: np.ndarray = frames) -> set[int]:
            return set(np.flatnonzero((frames == to_uint8(picture)).all(axis=(1, 2, 3))).tolist())

        # Neighbouring frames may be equal; the window of speech is not.
        windows = window(labels["speech"], torch.arange(len(frames)), PLAIN.conditioning.audio_context)
        (target,) = (windows == batch.audio_window[i]).all(dim=(1, 2)).nonzero()[:, 0].tolist()
        assert target in shows(batch.target[i])
        identity = shows(batch.identity[i])
        assert identity, "the identity is some frame of the same clip"
        older, newer = (shows(frame) for frame in batch.motion_frames[i])
        assert target - 1 in newer if target >= 1 else newer == identity
        assert target - 2 in older if target >= 2 else older == identity
        assert torch.equal(batch.mouth_box[i], labels["mouth_box"][target])
        assert torch.equal(batch.lip_window[i], window(centred(labels["lips"]), target, 2))
        at_the_start += target < 2 and len(frames) > 1
    assert at_the_start, "no example of the first frames was drawn: choose another seed"


def test_a_batchs_shapes(dataset: Dataset) -> None:
    config = override(PLAIN, {"conditioning": {"motion_frames": 3, "audio_context": 1, "lip_context": 0}})
    batch = draw_batch(dataset, dataset.split("train"), config, 0)
    assert batch.target.shape == batch.identity.shape == (64, 3, 32, 32)
    assert batch.motion_frames.shape == (64, 3, 3, 32, 32)
    assert batch.audio_window.shape == (64, 3, 384)
    assert batch.lip_window.shape == (64, 1, 3)
    assert batch.mouth_box.shape == (64, 4)
    assert batch.target.dtype == batch.audio_window.dtype == torch.float32
    assert -1 <= batch.target.min() < -0.5 < 0.5 < batch.target.max() <= 1


def test_draws_follow_the_shares(dataset: Dataset) -> None:
    clips = dataset.split("train")
    drawn = [name for step in range(4) for name in draw_batch(dataset, clips, PLAIN, step).clips]
    shares = data._shares(clips, PLAIN.training.still_share, PLAIN.training.speaker_cap)
    for clip, share in zip(clips, shares, strict=True):
        spread = (share * (1 - share) / len(drawn)) ** 0.5
        assert drawn.count(clip.clip) / len(drawn) == pytest.approx(share, abs=4 * spread)


# --- Shares


def clips_of(**counts: int) -> list[Clip]:
    """That many clips of each speaker; speakers whose names begin with `still` have photos."""
    return [
        Clip(f"{speaker}/{i}", speaker, "train", 1 if speaker.startswith("still") else 75, "")
        for speaker, count in counts.items()
        for i in range(count)
    ]


def speaker_shares(clips: list[Clip], still_share: float, cap: float) -> dict[str, float]:
    shares = data._shares(clips, still_share, cap)
    assert shares.sum() == pytest.approx(1)
    total: dict[str, float] = {}
    for clip, share in zip(clips, shares, strict=True):
        total[clip.speaker] = total.get(clip.speaker, 0) + share
    return total


def test_speakers_count_by_the_root_of_their_clips() -> None:
    shares = speaker_shares(clips_of(a=9, b=4, c=1), 0.0, 1.0)
    assert shares == pytest.approx({"a": 3 / 6, "b": 2 / 6, "c": 1 / 6})
    each = data._shares(clips_of(a=9, b=4, c=1), 0.0, 1.0)
    assert each[:9] == pytest.approx([3 / 6 / 9] * 9)


def test_no_speaker_gets_more_than_the_cap() -> None:
    assert speaker_shares(clips_of(a=144, b=4, c=1, d=1), 0.0, 0.4) == pytest.approx(
        {"a": 0.4, "b": 0.3, "c": 0.15, "d": 0.15}
    )
    # What one loses may lift another over it.
    assert speaker_shares(clips_of(a=100, b=81, c=1, d=1), 0.0, 0.3) == pytest.approx(
        {"a": 0.3, "b": 0.3, "c": 0.2, "d": 0.2}
    )
    # A cap that cannot be kept gives everybody the same.
    assert speaker_shares(clips_of(a=100, b=1), 0.0, 0.25) == pytest.approx({"a": 0.5, "b": 0.5})


def test_stills_get_exactly_their_share() -> None:
    stills = {f"still_{i}": 1 for i in range(5)}
    shares = speaker_shares(clips_of(a=4, b=1, **stills), 0.1, 1.0)
    assert shares == pytest.approx({"a": 0.6, "b": 0.3, **dict.fromkeys(stills, 0.02)})
    assert speaker_shares(clips_of(**stills), 0.1, 0.25) == pytest.approx(dict.fromkeys(stills, 0.2))
    assert speaker_shares(clips_of(a=4), 0.1, 0.25) == pytest.approx({"a": 1})
    assert speaker_shares(clips_of(a=4, **stills), 0.0, 0.25) == pytest.approx({"a": 1, **dict.fromkeys(stills, 0)})


def test_a_speaker_with_photos_and_clips_is_drawn_as_both() -> None:
    clips = [*clips_of(a=4, b=1), Clip("a/photo", "a", "train", 1, "")]
    assert data._shares(clips, 0.1, 1.0) == pytest.approx([0.6 / 4] * 4 + [0.3, 0.1])


# --- Augmentation


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def boxes(count: int, x0: int, y0: int, x1: int, y1: int) -> Tensor:
    return torch.tensor([[x0, y0, x1, y1]], dtype=torch.float32).repeat(count, 1)


def test_all_frames_of_an_example_change_alike() -> None:
    one = torch.rand(16, 1, 3, 32, 32, generator=generator()) * 2 - 1
    frames, _ = augment(one.repeat(1, 4, 1, 1, 1), boxes(16, 10, 18, 22, 26), generator(1))
    for k in range(1, 4):
        torch.testing.assert_close(frames[:, k], frames[:, 0], rtol=0, atol=1e-6)
    assert (frames[:, 0] - one[:, 0]).abs().mean((1, 2, 3)).min() > 0.05, "every example is changed"
    assert frames.shape == (16, 4, 3, 32, 32)


def test_examples_change_each_in_its_own_way() -> None:
    one = torch.rand(1, 1, 3, 32, 32, generator=generator()) * 2 - 1
    frames, _ = augment(one.repeat(8, 1, 1, 1, 1), boxes(8, 10, 18, 22, 26), generator(1))
    differences = (frames[:, None, 0] - frames[None, :, 0]).abs().mean((2, 3, 4))
    assert (differences + torch.eye(8) > 0.02).all()


def test_values_stay_in_range_and_the_given_frames_stay_as_they_are() -> None:
    given = torch.rand(32, 2, 3, 32, 32, generator=generator()) * 2 - 1
    kept = given.clone()
    frames, _ = augment(given, boxes(32, 10, 18, 22, 26), generator(2))
    assert torch.equal(given, kept)
    assert frames.isfinite().all()
    assert frames.min() >= -1
    assert frames.max() <= 1


def test_augmentation_is_a_function_of_its_generator() -> None:
    given, box = torch.rand(4, 2, 3, 32, 32, generator=generator()) * 2 - 1, boxes(4, 10, 18, 22, 26)
    first, again, other = (augment(given, box, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_the_mouth_box_follows_the_picture() -> None:
    """A bright spot in the box, off the middle, is in the box still, mirrored and moved as it may be."""
    size, count = 64, 64
    frames = torch.full((count, 1, 3, size, size), -0.9)
    box = boxes(count, 33, 38, 51, 50)
    frames[:, :, :, 40:48, 38:46] = 0.9  # its centre is that of the box: (42, 44)
    changed, moved = augment(frames, box, generator(5))
    luma = changed[:, 0].mean(1)  # (B, H, W)
    weight = (luma - luma.amin((1, 2), keepdim=True)) / (luma.amax((1, 2)) - luma.amin((1, 2)))[:, None, None]
    weight = weight.clamp(min=0.5) - 0.5
    pixel = torch.arange(size) + 0.5
    x = (weight.sum(1) * pixel).sum(1) / weight.sum((1, 2))
    y = (weight.sum(2) * pixel).sum(1) / weight.sum((1, 2))
    assert ((moved[:, 0] + moved[:, 2]) / 2 - x).abs().max() < 3
    assert ((moved[:, 1] + moved[:, 3]) / 2 - y).abs().max() < 3
    mirrored = x < size / 2
    assert 16 < mirrored.sum() < 48
    assert (moved[:, 2] - moved[:, 0] - 18).abs().max() <= 1, "as large as before"
    assert (moved[:, 3] - moved[:, 1] - 12).abs().max() <= 1


def test_drift_is_the_same_for_all_frames_of_an_example() -> None:
    one = torch.rand(16, 1, 3, 32, 32, generator=generator()) * 2 - 1
    frames = drift(one.repeat(1, 3, 1, 1, 1), 1.0, generator(7))
    assert torch.equal(frames[:, 1], frames[:, 0])
    assert torch.equal(frames[:, 2], frames[:, 0])
    assert frames.abs().max() <= 1
    change = (frames[:, 0] - one[:, 0]).abs().mean((1, 2, 3))
    assert change.min() < 0.02 < 0.15 < change.max(), "many hardly, some badly"
    assert torch.equal(drift(one, 1.0, generator(7)), drift(one, 1.0, generator(7)))
    torch.testing.assert_close(drift(one, 0.0, generator(7)), one)


def test_a_box_at_the_edge_stays_in_the_picture_and_is_not_empty() -> None:
    given = torch.zeros(64, 1, 3, 32, 32)
    _, moved = augment(given, boxes(64, 28, 29, 32, 32), generator(6))
    assert ((moved[:, :2] >= 0) & (moved[:, 2:] <= 32) & (moved[:, 2:] > moved[:, :2])).all()
    assert torch.equal(moved, moved.round())
