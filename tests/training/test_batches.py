"""The examples of a batch, and batches prepared ahead.

The clips are synthetic: the left half of each picture encodes the number of the frame, the right half that of the clip.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dheads.conditioning import Cues, window
from dheads.config import Config, override, preset, to_toml
from dheads.dataset import dataset as data
from dheads.dataset.clips import ResidentClips, fits
from dheads.dataset.dataset import Dataset, dataset_info
from dheads.dataset.manifest import Clip, write_clips
from dheads.errors import DheadsError
from dheads.media.pixels import to_uint8
from dheads.media.writing import write_clip
from dheads.system.prefetch import prefetch
from dheads.training.balance import clip_shares
from dheads.training.batches import Batch, Batches, Chosen, choose_frames

SIZE = 32
FRAMES = {"a/0": 9, "a/1": 12, "a/2": 7, "a/3": 2, "b/0": 12, "b/1": 10, "c/0": 12, "photo": 1}
PLAIN = override(
    preset("tiny"),
    {
        "conditioning": {"speech_dim": 8},
        "extensions": {
            "copying": {"gates": False},
            "motion": {"start_share": 0.0},
            "codes": {"eyes": {"event_share": 0.0}},
            "rollouts": {"share": 0.0},
            "examples": {"balance": "clips", "augment": False, "other_clip_share": 0.0},
        },
    },
)
LATE = {"rollouts": {"share": 0.5, "start": 0.75}}  # roll-outs in the last quarter of the run


def config_of(extensions: dict[str, object] | None = None, **optimisation: object) -> Config:
    """The plain configuration with other values in its sections extensions and optimisation."""
    return override(PLAIN, {"extensions": extensions or {}, "optimisation": optimisation})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    info = dataset_info(PLAIN)
    lines = to_toml(PLAIN)
    alignment = lines[lines.index("[alignment]") : lines.index("[preparation]")]
    top = [f"{key} = {value!r}" for key, value in info.items() if key != "alignment"]
    (root / "dataset.toml").write_text("\n".join(top) + "\n" + alignment, encoding="utf-8")
    for number, (name, count) in enumerate(FRAMES.items()):
        stem = root / "clips" / name
        stem.parent.mkdir(parents=True, exist_ok=True)
        write_clip(stem.with_suffix(".mp4"), (picture(number, k) for k in range(count)), torch.zeros(640 * count))
        save_file(labels(number, count), stem.with_suffix(".safetensors"))
    write_clips(root, [Clip(name, name.split("/")[0], "train", count, "") for name, count in FRAMES.items()])
    return root


def picture(clip: int, frame: int) -> np.ndarray:
    image = np.empty((SIZE, SIZE, 3), np.uint8)
    image[:, : SIZE // 2], image[:, SIZE // 2 :] = 20 + 16 * frame, 20 + 16 * clip
    return image


def seen(images: Tensor) -> list[tuple[int, int]]:
    """The numbers of clip and frame that each of the pictures (N, 3, H, W) in [-1, 1] shows."""
    grey = to_uint8(images).numpy().astype(float)
    halves = [grey[:, 4:-4, SIZE // 2 + 4 : -4], grey[:, 4:-4, 4 : SIZE // 2 - 4]]
    return [
        tuple(((half.mean((1, 2, 3))[i] - 20) / 16).round().astype(int) for half in halves) for i in range(len(grey))
    ]


def labels(clip: int, count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(clip)
    corner = torch.randint(0, 10, (count, 2), generator=generator)
    return {
        "speech": torch.randn((count, 8), generator=generator).half(),
        "landmarks": torch.rand((count, 68, 2), generator=generator) * SIZE,
        "mouth_box": torch.cat([corner, corner + 12], 1).float(),
        "lips": torch.rand((count, 3), generator=generator),
        "eyes": 0.3 - 0.2 * (torch.arange(count) % 5 == 1).float(),  # shut in frames 1, 6, ...
    }


@pytest.fixture(scope="module")
def dataset(made: Path) -> Dataset:
    return Dataset(made)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "data")


def opened(root: Path, config: Config = PLAIN, parts: int = 1) -> Batches:
    dataset = Dataset(root)
    dataset.check(config)
    return Batches(dataset, dataset.clips, config, parts)


def tensors(value: object) -> dict[str, Tensor]:
    """The tensors of a batch or its lead, by name."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    cues, boxes = fields.pop("cues"), fields.pop("code_boxes", {})
    fields |= {"audio_window": cues.audio_window, **{f"code {name}": code for name, code in cues.codes.items()}}
    fields |= {f"box {name}": box for name, box in boxes.items()}
    return {name: field for name, field in fields.items() if isinstance(field, Tensor)}


def same(a: object, b: object) -> bool:
    mine, others = tensors(a), tensors(b)
    assert {"motion_frames", "audio_window", "code lips", "code eyes"} <= mine.keys() == others.keys()
    return all(torch.equal(mine[name], others[name]) for name in mine)


def same_batches(a: Batch, b: Batch) -> bool:
    """Apart from their leads."""
    return a.clips == b.clips and same(a, b)


# --- Examples


@pytest.mark.parametrize("identity_frame", ["random", "first"])
def test_a_batch_holds_what_the_clips_hold(dataset: Dataset, identity_frame: str) -> None:
    """An example is a frame, those before it (copies of the identity before the first), its sound and its boxes."""
    config = override(config_of(batch_size=64), {"conditioning": {"identity_frame": identity_frame}})
    batch = Batches(dataset, dataset.clips, config).batch(0, 0)
    names = list(FRAMES)
    targets, identities = seen(batch.target), seen(batch.identity)
    for i, name in enumerate(batch.clips):
        clip, target = targets[i]
        identity = identities[i][1]
        assert names[clip] == name
        assert identities[i][0] == clip
        assert target != identity or FRAMES[name] == 1, "an identity that is the target teaches to copy"
        before = [k if k >= 0 else identity for k in (target - 2, target - 1)]
        assert seen(batch.motion_frames[i]) == [(clip, k) for k in before]
        label = dataset.labels(dataset.clips[clip])
        sound = label["speech"] if FRAMES[name] > 1 else torch.zeros_like(label["speech"])  # a photo has none
        assert torch.equal(batch.cues.audio_window[i], window(sound, target, 2))
        assert torch.equal(batch.cues.codes["lips"][i], window(label["lips_code"], target, 2))
        assert torch.equal(batch.mouth_box[i], label["mouth_box"][target])
        assert torch.equal(batch.code_boxes["eyes"][i], label["eyes_box"][target])
        assert torch.equal(batch.cues.codes["eyes"][i], window(label["eyes_code"], target, 2))
    if identity_frame == "first":
        assert {identity for _, identity in identities} == {0}


def test_shares_of_the_examples_show_blinks_and_starts(dataset: Dataset) -> None:
    """More blinks than the clips have, and motion frames as at a video's start, in the configured shares."""

    def chosen(**extensions: dict[str, object]) -> Iterator[tuple[int, int, list[int]]]:
        clips = [clip for clip in dataset.clips if clip.frames > 6]  # two blinks or more
        batch = Batches(dataset, clips, config_of(extensions, batch_size=400)).batch(0, 0)
        for (_, target), (_, identity), motion in zip(
            seen(batch.target), seen(batch.identity), map(seen, batch.motion_frames), strict=True
        ):
            yield target, identity, [k for _, k in motion]

    usual = list(chosen())
    assert sum(target % 5 == 1 for target, _, _ in chosen(codes={"eyes": {"event_share": 1.0}})) == 400
    assert sum(target % 5 == 1 for target, _, _ in usual) < 200
    started = [motion == [identity] * 2 for _, identity, motion in chosen(motion={"start_share": 0.5})]
    first_frames = sum(target == 0 for target, _, _ in usual)
    assert 150 < sum(started) - first_frames / 2 < 250


def test_all_pairs_of_target_and_identity_are_equally_likely() -> None:
    rng = np.random.default_rng(0)
    pairs = Counter(choose_frames(4, False, rng) for _ in range(12_000))
    assert set(pairs) == set(itertools.permutations(range(4), 2))
    assert all(count == pytest.approx(1000, abs=120) for count in pairs.values())
    assert Counter(choose_frames(4, True, rng)[0] for _ in range(300)).keys() == {1, 2, 3}
    assert choose_frames(1, False, rng) == choose_frames(1, True, rng) == (0, 0)


@pytest.mark.parametrize(("motion", "audio", "lip"), [(0, 0, 0), (1, 3, 1), (2, 2, 2), (3, 0, 0)])
def test_the_shapes_of_the_ablations(dataset: Dataset, motion: int, audio: int, lip: int) -> None:
    for augmented in (False, True):
        changes = {"examples": {"augment": augmented}, "codes": {"lips": {"context": lip}}}
        conditioning = {"motion_frames": motion, "audio_context": audio}
        config = override(config_of(changes), {"conditioning": conditioning})
        batch = Batches(dataset, dataset.clips, config).batch(0, 0)
        assert batch.target.shape == batch.identity.shape == (4, 3, SIZE, SIZE)
        assert batch.motion_frames.shape == (4, motion, 3, SIZE, SIZE)
        assert batch.cues.audio_window.shape == (4, 2 * audio + 1, 8)
        assert batch.cues.codes["lips"].shape == (4, 2 * lip + 1, 3)
        assert batch.mouth_box.shape == batch.code_boxes["eyes"].shape == (4, 4)
        assert batch.cues.codes["eyes"].shape == (4, 5, 1)
        assert batch.target.dtype == batch.cues.audio_window.dtype == torch.float32
        assert batch.target.abs().max() <= 1


# --- The examples of a step


def test_an_epoch_holds_every_clip_once_in_an_order_of_its_own(dataset: Dataset) -> None:
    batches = Batches(dataset, dataset.clips, config_of(batch_size=2), parts=2)
    assert batches.steps_per_epoch == 2
    epochs = []
    for epoch in range(3):
        keys = itertools.product((2 * epoch, 2 * epoch + 1), (0, 1))
        epochs.append([name for key in keys for name in batches.batch(*key).clips])
        assert sorted(epochs[-1]) == sorted(FRAMES)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(FRAMES)


def test_epochs_may_end_within_a_batch(dataset: Dataset) -> None:
    batches = Batches(dataset, dataset.clips, config_of(batch_size=3))
    names = [clip.clip for step in range(8) for clip in batches.clips_of(step, 0)]
    assert batches.steps_per_epoch == pytest.approx(8 / 3)
    assert [sorted(names[i : i + 8]) for i in (0, 8, 16)] == [sorted(FRAMES)] * 3
    assert [name for step in range(8) for name in batches.batch(step, 0).clips] == names


@pytest.mark.parametrize("balance", ["clips", "speakers"])
def test_a_step_is_the_same_however_it_is_split(dataset: Dataset, balance: str) -> None:
    """The batches of two processes, or of one that accumulates, are the halves of one large batch."""
    examples = {"examples": {"balance": balance}}
    whole = Batches(dataset, dataset.clips, config_of(examples, batch_size=6))
    halves = [Batches(dataset, dataset.clips, config_of(examples, batch_size=3), 2) for _ in range(2)]
    for step in (0, 5):
        batch, (first, second) = whole.batch(step, 0), (half.batch(step, part) for part, half in enumerate(halves))
        assert batch.clips == first.clips + second.clips
        assert [clip.clip for clip in whole.clips_of(step, 0)] == batch.clips
        assert torch.equal(batch.target, torch.cat([first.target, second.target]))
        assert torch.equal(batch.cues.audio_window, torch.cat([first.cues.audio_window, second.cues.audio_window]))


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("balance", ["clips", "speakers"])
def test_a_batch_is_a_function_of_seed_step_and_part(made: Path, balance: str, augmented: bool) -> None:
    config = config_of({"examples": {"balance": balance, "augment": augmented}})
    batches = opened(made, config, 2)
    batch = batches.batch(7, 1)
    batches.batch(8, 0)
    torch.manual_seed(5)
    np.random.seed(5)
    assert same_batches(batch, batches.batch(7, 1))
    assert same_batches(batch, opened(made, config, 2).batch(7, 1)), "the same from a folder just opened"
    others = [
        batches.batch(8, 1),
        batches.batch(7, 0),
        opened(made, override(config, {"optimisation": {"seed": 1}}), 2).batch(7, 1),
    ]
    for other in others:
        assert not torch.equal(batch.target, other.target)
        assert not torch.equal(batch.cues.audio_window, other.cues.audio_window)


def test_a_clip_is_used_with_other_frames_in_another_epoch(dataset: Dataset) -> None:
    batches = Batches(dataset, [dataset.clips[1]], config_of(batch_size=64))
    assert {frame for _, frame in seen(batches.batch(0, 0).target)} == set(range(12))


def test_balanced_examples_follow_the_shares(dataset: Dataset) -> None:
    clips, count = dataset.clips, 4000
    examples = {"balance": "speakers", "still_share": 0.1, "speaker_cap": 0.4}
    config = config_of({"examples": examples}, batch_size=count)
    chosen = Counter(clip.clip for clip in Batches(dataset, clips, config).clips_of(0, 0))
    for clip, share in zip(clips, clip_shares(clips, 0.1, 0.4), strict=True):
        assert chosen[clip.clip] / count == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)


def test_a_large_dataset_gives_the_same_batches(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = opened(made).batch(3, 0)
    monkeypatch.setattr(data, "_KEPT_BYTES", 0)
    assert same_batches(opened(made).batch(3, 0), kept)


# --- Clips that cannot be read


def test_a_clip_that_cannot_be_read_is_replaced_and_reported_once(made: Path, copy: Path) -> None:
    (copy / "clips" / "a" / "1.mp4").unlink()
    labels = copy / "clips" / "c" / "0.safetensors"
    labels.write_bytes(labels.read_bytes()[:100])
    config = config_of(batch_size=8)
    whole, batches, again = opened(made, config), opened(copy, config), opened(copy, config)
    for epoch in range(4):
        wanted, batch = whole.batch(epoch, 0), batches.batch(epoch, 0)
        for i, name in enumerate(wanted.clips):
            if name in ("a/1", "c/0"):
                assert batch.clips[i] not in ("a/1", "c/0")
            else:
                assert batch.clips[i] == name
                assert torch.equal(batch.target[i], wanted.target[i]), "the other examples are what they were"
        names = list(FRAMES)
        assert [names[clip] for clip, _ in seen(batch.target)] == batch.clips
        assert same_batches(batch, again.batch(epoch, 0)), "replaced by the same"
    assert set(batches.broken) == {"a/1", "c/0"}
    assert "1.mp4: cannot be read" in batches.broken["a/1"]
    assert list(batches.broken) == [clip.clip for clip in batches.clips_of(0, 0) if clip.clip in ("a/1", "c/0")]
    assert not whole.broken


def test_speech_of_another_length_is_no_clip_to_train_on(copy: Path) -> None:
    path = copy / "clips" / "b" / "0.safetensors"
    save_file({**labels(4, 12), "speech": torch.zeros(12, 5)}, path)
    batches = opened(copy, config_of(batch_size=8))
    assert "b/0" not in batches.batch(0, 0).clips
    assert batches.broken["b/0"].startswith("b/0: has 5 values of speech a frame instead of 8")


@pytest.mark.parametrize("balance", ["clips", "speakers"])
def test_a_folder_that_is_gone_ends_the_run(copy: Path, balance: str) -> None:
    batches = opened(copy, config_of({"examples": {"balance": balance}}, batch_size=10))
    shutil.rmtree(copy / "clips")
    with pytest.raises(DheadsError, match=r"data: 20 clips in a row could not be read .*is the folder still there"):
        batches.batch(0, 0)
    assert 0 < len(batches.broken) <= 8


def test_some_broken_clips_never_end_a_run(copy: Path) -> None:
    for name in ("a/0", "a/1", "a/2"):
        (copy / "clips" / f"{name}.mp4").unlink()
    batches = opened(copy, config_of(batch_size=16))
    for step in range(20):
        assert len(batches.batch(step, 0).clips) == 16
    assert set(batches.broken) == {"a/0", "a/1", "a/2"}


# --- Batches prepared ahead


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_prepared_ahead_come_in_order(made: Path, threads: int) -> None:
    config = config_of({"examples": {"augment": True}})
    keys = [(step, part) for step in (4, 0, 9) for part in range(3)]
    alone = opened(made, config, 3)
    ahead = list(opened(made, config, 3).ahead(keys, threads))
    assert len(ahead) == len(keys)
    assert all(same_batches(alone.batch(*key), batch) for key, batch in zip(keys, ahead, strict=True))
    assert not prefetch_threads()


class Scripted(Batches):
    """Records the keys that are asked for, and the number of threads that each computes with; one key may fail."""

    def __init__(self, fails: tuple[int, int] | None = None) -> None:
        self.asked: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.fails = fails

    def batch(self, step: int, part: int) -> Batch:
        self.asked.append((step, part))
        self.threads.add(torch.get_num_threads())
        if (step, part) == self.fails:
            raise DheadsError("no more")
        empty = torch.zeros(0)
        return Batch(empty, empty, empty, Cues(empty), empty, {}, [f"{step} {part}"])


def test_an_error_is_raised_in_its_turn() -> None:
    batches = prefetch(Scripted(fails=(3, 0)).batch, ((step, 0) for step in itertools.count()), 2)
    assert [next(batches).clips for _ in range(3)] == [["0 0"], ["1 0"], ["2 0"]]
    with pytest.raises(DheadsError, match="no more"):
        next(batches)
    assert not prefetch_threads()
    with pytest.raises(StopIteration):
        next(batches)


def test_no_more_are_made_than_will_soon_be_needed_and_closing_ends_the_threads() -> None:
    before = torch.get_num_threads()
    asked = 0

    def keys() -> Iterator[tuple[int, int]]:
        nonlocal asked
        for asked in itertools.count(1):
            yield asked, 0

    scripted = Scripted()
    batches = prefetch(scripted.batch, keys(), 2)
    assert asked == 0, "nothing is made before the first batch is asked for"
    for count in range(1, 30):
        assert next(batches).clips == [f"{count} 0"]
        assert asked == count + 4
    assert len(prefetch_threads()) == 2
    batches.close()
    assert not prefetch_threads()
    assert len(scripted.asked) <= 33
    assert scripted.threads == {1}
    assert torch.get_num_threads() == before


def test_nothing_asked_for_is_nothing_made() -> None:
    assert list(prefetch(Scripted().batch, [], 2)) == []


# --- All clips in the memory of a device


def resident(root: Path, config: Config, parts: int = 1, device: str = "cpu") -> Batches:
    dataset = Dataset(root)
    tables = ResidentClips(dataset, dataset.clips, config.conditioning.speech_dim, torch.device(device), threads=2)
    return Batches(dataset, dataset.clips, config, parts, tables)


def everything(balance: str = "clips") -> Config:
    """All that an example may consist of."""
    extensions = {
        "motion": {"start_share": 0.1},
        "codes": {"eyes": {"event_share": 0.3}},
        "rollouts": {"share": 0.5, "start": 0.5},
        "examples": {"augment": True, "other_clip_share": 0.5, "balance": balance},
    }
    return config_of(extensions, batch_size=32, steps=8)


def with_voices(root: Path) -> Path:
    for clip, count in FRAMES.items():
        path = root / "clips" / f"{clip}.safetensors"
        save_file(load_file(path) | {"speech_at_tempos": torch.randn(2, count, 8).half()}, path)
    return root


@pytest.mark.parametrize("balance", ["clips", "speakers"])
def test_resident_clips_give_the_readers_batches(copy: Path, balance: str) -> None:
    """Early and late in a run, at every tempo, and with the same replacements of clips that cannot be read."""
    with_voices(copy)
    video, labels = copy / "clips" / "a" / "1.mp4", copy / "clips" / "c" / "0.safetensors"
    video.write_bytes(video.read_bytes()[:2000])
    labels.write_bytes(labels.read_bytes()[:100])
    config = everything(balance)
    reader, tables = opened(copy, config, 2), resident(copy, config, 2)
    for step, part in ((0, 0), (3, 1), (4, 0), (7, 1)):
        wanted, batch = reader.batch(step, part), tables.batch(step, part)
        assert same_batches(batch, wanted)
        assert (batch.lead is None) is (step < 4)
        if batch.lead is not None and wanted.lead is not None:
            assert same(batch.lead, wanted.lead)
    assert tables.broken == reader.broken
    assert set(tables.broken) == {"a/1", "c/0"}


def test_resident_speech_of_another_length_is_no_clip_to_train_on(copy: Path) -> None:
    save_file({**labels(4, 12), "speech": torch.zeros(12, 5)}, copy / "clips" / "b" / "0.safetensors")
    batches = resident(copy, config_of(batch_size=8))
    assert "b/0" not in batches.batch(0, 0).clips
    assert batches.broken["b/0"].startswith("b/0: has 5 values of speech a frame instead of 8")


def test_batches_of_resident_clips_never_leave_their_device(made: Path) -> None:
    """On "meta" nothing has a value: only its shape and device are seen."""
    batches = resident(made, everything(), device="meta")
    wanted = opened(made, everything()).batch(6, 0)
    (batch,) = batches.ahead([(6, 0)], 1)
    assert batch.clips == wanted.clips
    for mine, other in ((batch, wanted), (batch.lead, wanted.lead)):
        values, expected = tensors(mine), tensors(other)
        assert values.keys() == expected.keys()
        for name, value in values.items():
            assert value.is_meta, name
            assert (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype), name


def test_only_the_callers_thread_uses_the_device(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in the order of the batches, so that all work may be one stream of a GPU."""
    calls: list[tuple[str, int]] = []
    batches, assemble = resident(made, everything(), device="meta"), Batches.assemble

    def recorded(self: Batches, chosen: Chosen) -> Batch:
        calls.append((threading.current_thread().name, chosen.step))
        return assemble(self, chosen)

    monkeypatch.setattr(Batches, "assemble", recorded)
    assert len(list(batches.ahead([(step, 0) for step in range(4)], 3))) == 4
    assert calls == [(threading.current_thread().name, step) for step in range(4)]
    assert not prefetch_threads()


def test_clips_fit_in_half_of_a_gpus_free_memory(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(FRAMES.values()) * (3 * SIZE**2 + 4096)
    gpu, free = torch.device("cuda", 0), [2 * size, 3 * size]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: tuple(free))
    assert fits(dataset, dataset.clips, gpu)
    free[0] -= 2
    assert not fits(dataset, dataset.clips, gpu)
    assert not fits(dataset, dataset.clips, torch.device("cpu")), "on a CPU the reader keeps what it has read"


# --- Variation of the examples


def test_some_identities_are_from_another_clip_of_the_speaker(dataset: Dataset) -> None:
    clips = [clip for clip in dataset.clips if clip.speaker in {"a", "c"}]
    batch = Batches(dataset, clips, config_of({"examples": {"other_clip_share": 0.5}}, batch_size=400)).batch(0, 0)
    names, others = list(FRAMES), Counter()
    for name, identity, motion, target in zip(
        batch.clips, seen(batch.identity), map(seen, batch.motion_frames), seen(batch.target), strict=True
    ):
        shown = names[identity[0]]
        assert shown.split("/")[0] == name.split("/")[0], "never somebody else"
        others[name.split("/")[0]] += shown != name
        # Motion frames are copies of the identity that is shown, or the clip's own.
        own = (names.index(name), target[1])
        assert motion == [identity if own[1] - k < 0 else (own[0], own[1] - k) for k in (2, 1)]
    assert others["c"] == 0, "there is no other clip"
    assert 0.4 < others["a"] / sum(name.startswith("a/") for name in batch.clips) < 0.6


def test_speech_at_other_tempos_is_heard_as_often(copy: Path) -> None:
    voices = {}
    for clip in FRAMES:
        path = copy / "clips" / f"{clip}.safetensors"
        stored = load_file(path)
        stored["speech"][:] = 1
        voices[clip] = stored | {"speech_at_tempos": torch.stack([stored["speech"] * k for k in (2, 3)])}
        save_file(voices[clip], path)

    def heard(augment: bool) -> Counter[float]:
        config = config_of({"examples": {"balance": "speakers", "augment": augment}}, batch_size=300)
        audio_window = opened(copy, config).batch(0, 0).cues.audio_window
        assert (audio_window == audio_window[:, :1, :1]).all(), "one voice an example"
        return Counter(audio_window[:, 0, 0].tolist())

    assert set(heard(augment=False)) == {0.0, 1.0}, "a photo has no sound"
    counts = heard(augment=True)
    assert all(counts[k] == pytest.approx((300 - counts[0.0]) / 3, abs=30) for k in (1, 2, 3))


def test_late_in_a_run_some_examples_have_a_lead(made: Path) -> None:
    """It is what the network needs to generate their motion frames: the frames before these, and their cues."""
    started = {"motion": {"start_share": 0.1}}
    config = config_of(LATE | started, steps=8, batch_size=64)
    batches = opened(made, config)
    assert all(batches.batch(step, 0).lead is None for step in (0, 5))
    plain = opened(made, config_of(started, steps=8, batch_size=64))
    batch = batches.batch(6, 0)
    assert same_batches(batch, plain.batch(6, 0)), "the examples themselves are as they would have been"
    lead, dataset = batch.lead, Dataset(made)
    assert lead is not None
    names, contexts = list(FRAMES), {name: table.context for name, table in config.extensions.codes.items()}
    assert set(contexts) == set(lead.cues.codes) == {"lips", "eyes"}
    for row, index in enumerate(lead.index.tolist()):
        clip, target = seen(batch.target[index][None])[0]
        _, identity = seen(batch.identity[index][None])[0]
        assert target >= 2, "there are two frames before it"
        assert seen(batch.motion_frames[index]) == [(clip, target - 2), (clip, target - 1)]
        first = [identity if k < 0 else k for k in (target - 4, target - 3)]
        assert seen(lead.motion_frames[row]) == [(clip, k) for k in first]
        labels = dataset.labels(next(c for c in dataset.clips if c.clip == names[clip]))
        frames, context = torch.tensor([target - 2, target - 1]), config.conditioning.audio_context
        assert torch.equal(lead.cues.audio_window[row], window(labels["speech"], frames, context))
        for name, code in lead.cues.codes.items():
            assert torch.equal(code[row], window(labels[f"{name}_code"], frames, contexts[name]))
    able = sum(
        seen(motion[None, 0])[0][1] == seen(target[None])[0][1] - 2 and seen(target[None])[0][1] >= 2
        for motion, target in zip(batch.motion_frames, batch.target, strict=True)
    )
    assert 0.3 * able < len(lead.index) < 0.7 * able
