"""Which examples a training step is made of, and batches made ahead of it.

The clips are made here: every picture says in its left half which frame it is, and in its right half of which clip.
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

from dheads.conditioning import window
from dheads.config import Config, override, preset, to_toml
from dheads.dataset import dataset as data
from dheads.dataset.clips import ResidentClips, fits
from dheads.dataset.dataset import Dataset, dataset_info
from dheads.dataset.manifest import Clip, write_clips
from dheads.errors import DheadsError
from dheads.media.pixels import to_uint8
from dheads.media.writing import write_clip
from dheads.system.prefetch import prefetch
from dheads.training import batches as draws
from dheads.training.batches import Batch, Batches, Chosen, Lead

SIZE = 32
FRAMES = {"a/0": 9, "a/1": 12, "a/2": 7, "a/3": 2, "b/0": 12, "b/1": 10, "c/0": 12, "photo": 1}
PLAIN = override(
    preset("tiny"),
    {
        "model": {"copy_gates": False},
        "conditioning": {"speech_dim": 8},
        "training": {
            "augment": False,
            "balance": "clips",
            "blink_share": 0.0,
            "start_share": 0.0,
            "rollout_share": 0.0,
            "other_clip_share": 0.0,
        },
    },
)


def config_of(training: dict[str, object] | None = None, **conditioning: object) -> Config:
    return override(PLAIN, {"training": training or {}, "conditioning": conditioning})


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
    """(N, 3, H, W) in [-1, 1] -> the clip and the frame that each shows."""
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


def same(a: Batch, b: Batch) -> bool:
    tensors = [field.name for field in dataclasses.fields(Batch) if field.name not in {"clips", "lead"}]
    return a.clips == b.clips and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


# --- What an example is


@pytest.mark.parametrize("identity_frame", ["random", "first"])
def test_a_batch_holds_what_the_clips_hold(dataset: Dataset, identity_frame: str) -> None:
    """Each example is a frame, those before it (the identity where there is none), and that frame's sound and mouth."""
    config = config_of({"batch_size": 64}, identity_frame=identity_frame)
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
        assert torch.equal(batch.audio_window[i], window(sound, target, 2))
        assert torch.equal(batch.lip_window[i], window(label["centred_lips"], target, 2))
        assert torch.equal(batch.mouth_box[i], label["mouth_box"][target])
        assert torch.equal(batch.eye_box[i], label["eye_box"][target])
        assert torch.equal(batch.eye_window[i], window(label["eye_code"], target, 2))
    if identity_frame == "first":
        assert {identity for _, identity in identities} == {0}


def test_some_examples_blink_and_some_are_told_nothing_of_what_was_before(dataset: Dataset) -> None:
    """More blinks than there are, and motion frames as at the start of a video, in the shares that are asked for."""

    def drawn(**training: float) -> Iterator[tuple[int, int, list[int]]]:
        clips = [clip for clip in dataset.clips if clip.frames > 6]  # two blinks or more
        batch = Batches(dataset, clips, config_of({"batch_size": 400, **training})).batch(0, 0)
        for (_, target), (_, identity), motion in zip(
            seen(batch.target), seen(batch.identity), map(seen, batch.motion_frames), strict=True
        ):
            yield target, identity, [k for _, k in motion]

    usual = list(drawn())
    assert sum(target % 5 == 1 for target, _, _ in drawn(blink_share=1.0)) == 400
    assert sum(target % 5 == 1 for target, _, _ in usual) < 200
    started = [motion == [identity] * 2 for _, identity, motion in drawn(start_share=0.5)]
    by_place = sum(target == 0 for target, _, _ in usual)
    assert 150 < sum(started) - by_place / 2 < 250


def test_every_pair_of_two_frames_is_drawn_as_often() -> None:
    rng = np.random.default_rng(0)
    pairs = Counter(draws._frames(4, False, rng) for _ in range(12_000))
    assert set(pairs) == set(itertools.permutations(range(4), 2))
    assert all(count == pytest.approx(1000, abs=120) for count in pairs.values())
    assert Counter(draws._frames(4, True, rng)[0] for _ in range(300)).keys() == {1, 2, 3}
    assert draws._frames(1, False, rng) == draws._frames(1, True, rng) == (0, 0)


@pytest.mark.parametrize(("motion", "audio", "lip"), [(0, 0, 0), (1, 3, 1), (2, 2, 2), (3, 0, 0)])
def test_the_shapes_of_the_ablations(dataset: Dataset, motion: int, audio: int, lip: int) -> None:
    for augmented in (False, True):
        config = config_of({"augment": augmented}, motion_frames=motion, audio_context=audio, lip_context=lip)
        batch = Batches(dataset, dataset.clips, config).batch(0, 0)
        assert batch.target.shape == batch.identity.shape == (4, 3, SIZE, SIZE)
        assert batch.motion_frames.shape == (4, motion, 3, SIZE, SIZE)
        assert batch.audio_window.shape == (4, 2 * audio + 1, 8)
        assert batch.lip_window.shape == (4, 2 * lip + 1, 3)
        assert batch.mouth_box.shape == batch.eye_box.shape == (4, 4)
        assert batch.eye_window.shape == (4, 5, 1)
        assert batch.target.dtype == batch.audio_window.dtype == torch.float32
        assert batch.target.abs().max() <= 1


# --- Which examples make up a step


def test_an_epoch_holds_every_clip_once_in_an_order_of_its_own(dataset: Dataset) -> None:
    drawn = Batches(dataset, dataset.clips, config_of({"batch_size": 2}), parts=2)
    assert drawn.steps_per_epoch == 2
    epochs = []
    for epoch in range(3):
        keys = itertools.product((2 * epoch, 2 * epoch + 1), (0, 1))
        epochs.append([name for key in keys for name in drawn.draw(*key).clips])
        assert sorted(epochs[-1]) == sorted(FRAMES)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(FRAMES)


def test_epochs_may_end_within_a_batch(dataset: Dataset) -> None:
    drawn = Batches(dataset, dataset.clips, config_of({"batch_size": 3}))
    names = [clip.clip for step in range(8) for clip in drawn.clips_of(step, 0)]
    assert drawn.steps_per_epoch == pytest.approx(8 / 3)
    assert [sorted(names[i : i + 8]) for i in (0, 8, 16)] == [sorted(FRAMES)] * 3
    assert [name for step in range(8) for name in drawn.draw(step, 0).clips] == names


@pytest.mark.parametrize("balance", ["clips", "speakers"])
def test_a_step_is_the_same_however_it_is_split(dataset: Dataset, balance: str) -> None:
    """Two processes, or one that accumulates, draw what one large batch holds."""
    whole = Batches(dataset, dataset.clips, config_of({"batch_size": 6, "balance": balance}))
    halves = [Batches(dataset, dataset.clips, config_of({"batch_size": 3, "balance": balance}), 2) for _ in range(2)]
    for step in (0, 5):
        batch, (first, second) = whole.draw(step, 0), (draw.draw(step, part) for part, draw in enumerate(halves))
        assert batch.clips == first.clips + second.clips
        assert [clip.clip for clip in whole.clips_of(step, 0)] == batch.clips
        assert torch.equal(batch.target, torch.cat([first.target, second.target]))
        assert torch.equal(batch.audio_window, torch.cat([first.audio_window, second.audio_window]))


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("balance", ["clips", "speakers"])
def test_a_draw_is_a_function_of_seed_step_and_part(made: Path, balance: str, augmented: bool) -> None:
    config = config_of({"balance": balance, "augment": augmented})
    drawn = opened(made, config, 2)
    batch = drawn.draw(7, 1)
    drawn.draw(8, 0)
    torch.manual_seed(5)
    np.random.seed(5)
    assert same(batch, drawn.draw(7, 1))
    assert same(batch, opened(made, config, 2).draw(7, 1)), "the same from a folder just opened"
    others = [
        drawn.draw(8, 1),
        drawn.draw(7, 0),
        opened(made, override(config, {"training": {"seed": 1}}), 2).draw(7, 1),
    ]
    for other in others:
        assert not torch.equal(batch.target, other.target)
        assert not torch.equal(batch.audio_window, other.audio_window)


def test_a_clip_is_drawn_with_other_frames_in_another_epoch(dataset: Dataset) -> None:
    drawn = Batches(dataset, [dataset.clips[1]], config_of({"batch_size": 64}))
    assert {frame for _, frame in seen(drawn.draw(0, 0).target)} == set(range(12))


def test_balanced_draws_follow_the_shares(dataset: Dataset) -> None:
    clips, count = dataset.clips, 4000
    training = {"batch_size": count, "balance": "speakers", "still_share": 0.1, "speaker_cap": 0.4}
    drawn = Counter(clip.clip for clip in Batches(dataset, clips, config_of(training)).clips_of(0, 0))
    for clip, share in zip(clips, draws._shares(clips, 0.1, 0.4), strict=True):
        assert drawn[clip.clip] / count == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)


def test_a_large_dataset_gives_the_same_batches(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = opened(made).draw(3, 0)
    monkeypatch.setattr(data, "_KEPT_BYTES", 0)
    assert same(opened(made).draw(3, 0), kept)


# --- Clips that cannot be read


def test_a_clip_that_cannot_be_read_is_replaced_and_reported_once(made: Path, copy: Path) -> None:
    (copy / "clips" / "a" / "1.mp4").unlink()
    labels = copy / "clips" / "c" / "0.safetensors"
    labels.write_bytes(labels.read_bytes()[:100])
    config = config_of({"batch_size": 8})
    whole, drawn, again = opened(made, config), opened(copy, config), opened(copy, config)
    for epoch in range(4):
        wanted, batch = whole.draw(epoch, 0), drawn.draw(epoch, 0)
        for i, name in enumerate(wanted.clips):
            if name in ("a/1", "c/0"):
                assert batch.clips[i] not in ("a/1", "c/0")
            else:
                assert batch.clips[i] == name
                assert torch.equal(batch.target[i], wanted.target[i]), "the other examples are what they were"
        names = list(FRAMES)
        assert [names[clip] for clip, _ in seen(batch.target)] == batch.clips
        assert same(batch, again.draw(epoch, 0)), "replaced by the same"
    assert set(drawn.broken) == {"a/1", "c/0"}
    assert "1.mp4: cannot be read" in drawn.broken["a/1"]
    assert list(drawn.broken) == [clip.clip for clip in drawn.clips_of(0, 0) if clip.clip in ("a/1", "c/0")]
    assert not whole.broken


def test_speech_of_another_length_is_no_clip_to_train_on(copy: Path) -> None:
    path = copy / "clips" / "b" / "0.safetensors"
    save_file({**labels(4, 12), "speech": torch.zeros(12, 5)}, path)
    drawn = opened(copy, config_of({"batch_size": 8}))
    assert "b/0" not in drawn.draw(0, 0).clips
    assert drawn.broken["b/0"].startswith("b/0: has 5 values of speech a frame instead of 8")


@pytest.mark.parametrize("balance", ["clips", "speakers"])
def test_a_folder_that_is_gone_ends_the_run(copy: Path, balance: str) -> None:
    drawn = opened(copy, config_of({"balance": balance, "batch_size": 10}))
    shutil.rmtree(copy / "clips")
    with pytest.raises(DheadsError, match=r"data: 20 clips in a row could not be read .*is the folder still there"):
        drawn.draw(0, 0)
    assert 0 < len(drawn.broken) <= 8


def test_some_broken_clips_never_end_a_run(copy: Path) -> None:
    for name in ("a/0", "a/1", "a/2"):
        (copy / "clips" / f"{name}.mp4").unlink()
    drawn = opened(copy, config_of({"batch_size": 16}))
    for step in range(20):
        assert len(drawn.draw(step, 0).clips) == 16
    assert set(drawn.broken) == {"a/0", "a/1", "a/2"}


# --- Made ahead


def drawing_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_made_ahead_are_those_asked_for_in_order(made: Path, threads: int) -> None:
    config = config_of({"augment": True})
    keys = [(step, part) for step in (4, 0, 9) for part in range(3)]
    alone = opened(made, config, 3)
    ahead = list(opened(made, config, 3).ahead(keys, threads))
    assert len(ahead) == len(keys)
    assert all(same(alone.draw(*key), batch) for key, batch in zip(keys, ahead, strict=True))
    assert not drawing_threads()


class Scripted(Batches):
    """Keeps which keys were drawn, with how many threads each computes; one key may fail."""

    def __init__(self, fails: tuple[int, int] | None = None) -> None:
        self.drawn: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.fails = fails

    def draw(self, step: int, part: int) -> Batch:
        self.drawn.append((step, part))
        self.threads.add(torch.get_num_threads())
        if (step, part) == self.fails:
            raise DheadsError("no more")
        empty = torch.zeros(0)
        return Batch(empty, empty, empty, empty, empty, empty, empty, empty, [f"{step} {part}"])


def test_an_error_is_raised_in_its_turn() -> None:
    batches = prefetch(Scripted(fails=(3, 0)).draw, ((step, 0) for step in itertools.count()), 2)
    assert [next(batches).clips for _ in range(3)] == [["0 0"], ["1 0"], ["2 0"]]
    with pytest.raises(DheadsError, match="no more"):
        next(batches)
    assert not drawing_threads()
    with pytest.raises(StopIteration):
        next(batches)


def test_no_more_are_made_than_will_soon_be_needed_and_closing_ends_the_threads() -> None:
    before = torch.get_num_threads()
    asked = 0

    def keys() -> Iterator[tuple[int, int]]:
        nonlocal asked
        for asked in itertools.count(1):
            yield asked, 0

    drawn = Scripted()
    batches = prefetch(drawn.draw, keys(), 2)
    assert asked == 0, "nothing is made before the first batch is asked for"
    for count in range(1, 30):
        assert next(batches).clips == [f"{count} 0"]
        assert asked == count + 4
    assert len(drawing_threads()) == 2
    batches.close()
    assert not drawing_threads()
    assert len(drawn.drawn) <= 33
    assert drawn.threads == {1}
    assert torch.get_num_threads() == before


def test_nothing_asked_for_is_nothing_made() -> None:
    assert list(prefetch(Scripted().draw, [], 2)) == []


# --- All clips in the memory of a device


def resident(root: Path, config: Config, parts: int = 1, device: str = "cpu") -> Batches:
    dataset = Dataset(root)
    tables = ResidentClips(dataset, dataset.clips, config.conditioning.speech_dim, torch.device(device), threads=2)
    return Batches(dataset, dataset.clips, config, parts, tables)


def everything(**training: object) -> Config:
    """All that an example may be made of."""
    shares = {"blink_share": 0.3, "start_share": 0.1, "other_clip_share": 0.5, "rollout_share": 0.5}
    return config_of({"batch_size": 32, "augment": True, "steps": 8, "rollout_from": 0.5, **shares, **training})


def with_voices(root: Path) -> Path:
    for clip, count in FRAMES.items():
        path = root / "clips" / f"{clip}.safetensors"
        save_file(load_file(path) | {"speech_at_tempos": torch.randn(2, count, 8).half()}, path)
    return root


@pytest.mark.parametrize("balance", ["clips", "speakers"])
def test_resident_clips_give_the_readers_batches(copy: Path, balance: str) -> None:
    """Early and late in a run, at every tempo, and with the same clips in place of those that cannot be read."""
    with_voices(copy)
    video, labels = copy / "clips" / "a" / "1.mp4", copy / "clips" / "c" / "0.safetensors"
    video.write_bytes(video.read_bytes()[:2000])
    labels.write_bytes(labels.read_bytes()[:100])
    config = everything(balance=balance)
    reader, tables = opened(copy, config, 2), resident(copy, config, 2)
    for step, part in ((0, 0), (3, 1), (4, 0), (7, 1)):
        wanted, batch = reader.draw(step, part), tables.draw(step, part)
        assert same(batch, wanted)
        assert (batch.lead is None) is (step < 4)
        if batch.lead is not None and wanted.lead is not None:
            names = [field.name for field in dataclasses.fields(Lead)]
            assert all(torch.equal(getattr(batch.lead, name), getattr(wanted.lead, name)) for name in names)
    assert tables.broken == reader.broken
    assert set(tables.broken) == {"a/1", "c/0"}


def test_resident_speech_of_another_length_is_no_clip_to_train_on(copy: Path) -> None:
    save_file({**labels(4, 12), "speech": torch.zeros(12, 5)}, copy / "clips" / "b" / "0.safetensors")
    drawn = resident(copy, config_of({"batch_size": 8}))
    assert "b/0" not in drawn.draw(0, 0).clips
    assert drawn.broken["b/0"].startswith("b/0: has 5 values of speech a frame instead of 8")


def test_batches_of_resident_clips_never_leave_their_device(made: Path) -> None:
    """On "meta" nothing has a value: only its shape and device are seen."""
    drawn = resident(made, everything(), device="meta")
    wanted = opened(made, everything()).draw(6, 0)
    (batch,) = drawn.ahead([(6, 0)], 1)
    assert batch.clips == wanted.clips
    for mine, other in ((batch, wanted), (batch.lead, wanted.lead)):
        for field in dataclasses.fields(mine):
            value, told = getattr(mine, field.name), getattr(other, field.name)
            if isinstance(told, Tensor):
                assert value.is_meta, field.name
                assert (value.shape, value.dtype) == (told.shape, told.dtype), field.name


def test_a_device_is_told_its_work_by_the_callers_thread_alone(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in the order of the batches, so that all of it may be one stream of a GPU."""
    told: list[tuple[str, int]] = []
    drawn, plain = resident(made, everything(), device="meta"), Batches.made

    def noted(self: Batches, chosen: Chosen) -> Batch:
        told.append((threading.current_thread().name, chosen.step))
        return plain(self, chosen)

    monkeypatch.setattr(Batches, "made", noted)
    assert len(list(drawn.ahead([(step, 0) for step in range(6)], 3))) == 6
    assert told == [(threading.current_thread().name, step) for step in range(6)]
    assert not drawing_threads()


def test_what_fits_a_card_is_half_of_its_free_memory(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(FRAMES.values()) * (3 * SIZE**2 + 4096)
    card, free = torch.device("cuda", 0), [2 * size, 3 * size]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: tuple(free))
    assert fits(dataset, dataset.clips, card)
    free[0] -= 2
    assert not fits(dataset, dataset.clips, card)
    assert not fits(dataset, dataset.clips, torch.device("cpu")), "there the reader keeps what it has read"


# --- Shares


def clips_of(**counts: int) -> list[Clip]:
    """That many clips of each speaker; speakers whose names begin with `still` have photos."""
    return [
        Clip(f"{speaker}/{i}", speaker, "train", 1 if speaker.startswith("still") else 75, "")
        for speaker, count in counts.items()
        for i in range(count)
    ]


def speaker_shares(clips: list[Clip], still_share: float, cap: float) -> dict[str, float]:
    shares = draws._shares(clips, still_share, cap)
    assert shares.sum() == pytest.approx(1)
    total: dict[str, float] = {}
    for clip, share in zip(clips, shares, strict=True):
        total[clip.speaker] = total.get(clip.speaker, 0) + share
    return total


def test_speakers_count_by_the_root_of_their_clips() -> None:
    shares = speaker_shares(clips_of(a=9, b=4, c=1), 0.0, 1.0)
    assert shares == pytest.approx({"a": 3 / 6, "b": 2 / 6, "c": 1 / 6})
    each = draws._shares(clips_of(a=9, b=4, c=1), 0.0, 1.0)
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
    assert draws._shares(clips, 0.1, 1.0) == pytest.approx([0.6 / 4] * 4 + [0.3, 0.1])


def test_no_folder_of_the_raw_data_gets_more_than_its_cap() -> None:
    folders = {"a": "lab", "b": "lab", "c": "wild", "still": "photos"}
    clips = [
        dataclasses.replace(clip, source=f"{folders[clip.speaker]}/{clip.clip}.mp4")
        for clip in clips_of(a=9, b=1, c=1, still=1)
    ]
    total = dict.fromkeys(folders, 0.0)
    for clip, share in zip(clips, draws._shares(clips, 0.1, 1.0, 0.6), strict=True):
        total[clip.speaker] += share
    # By the roots 3 / 5, 1 / 5 and 1 / 5 of what the photo leaves; the lab's 4 / 5 are more than 0.6.
    assert total == pytest.approx({"a": 0.9 * 0.45, "b": 0.9 * 0.15, "c": 0.9 * 0.4, "still": 0.1})


def test_some_identities_are_of_another_clip_of_the_speaker(dataset: Dataset) -> None:
    clips = [clip for clip in dataset.clips if clip.speaker in {"a", "c"}]
    batch = Batches(dataset, clips, config_of({"batch_size": 400, "other_clip_share": 0.5})).batch(0, 0)
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

    def heard(**training: object) -> Counter[float]:
        drawn = opened(copy, config_of({"batch_size": 300, "balance": "speakers", **training})).draw(0, 0)
        assert (drawn.audio_window == drawn.audio_window[:, :1, :1]).all(), "one voice an example"
        return Counter(drawn.audio_window[:, 0, 0].tolist())

    assert set(heard()) == {0.0, 1.0}, "a photo has no sound"
    told = heard(augment=True)
    assert all(told[k] == pytest.approx((300 - told[0.0]) / 3, abs=30) for k in (1, 2, 3))


def test_late_in_a_run_some_examples_bring_what_their_motion_frames_are_drawn_from(made: Path) -> None:
    config = config_of({"rollout_share": 0.5, "rollout_from": 0.75, "steps": 8, "batch_size": 64, "start_share": 0.1})
    drawn = opened(made, config)
    assert all(drawn.draw(step, 0).lead is None for step in (0, 5))
    plain = opened(made, config_of({"steps": 8, "batch_size": 64, "start_share": 0.1}))
    batch = drawn.draw(6, 0)
    assert same(batch, plain.draw(6, 0)), "the examples themselves are as they would have been"
    lead, dataset = batch.lead, Dataset(made)
    assert lead is not None
    names, told = list(FRAMES), config.conditioning
    for row, place in enumerate(lead.index.tolist()):
        clip, target = seen(batch.target[place][None])[0]
        _, identity = seen(batch.identity[place][None])[0]
        assert target >= 2, "there are two frames before it"
        assert seen(batch.motion_frames[place]) == [(clip, target - 2), (clip, target - 1)]
        first = [identity if k < 0 else k for k in (target - 4, target - 3)]
        assert seen(lead.motion_frames[row]) == [(clip, k) for k in first]
        labels = dataset.labels(next(c for c in dataset.clips if c.clip == names[clip]))
        made_frames = torch.tensor([target - 2, target - 1])
        assert torch.equal(lead.audio_windows[row], window(labels["speech"], made_frames, told.audio_context))
        assert torch.equal(lead.lip_windows[row], window(labels["centred_lips"], made_frames, told.lip_context))
        assert torch.equal(lead.eye_windows[row], window(labels["eye_code"], made_frames, told.eye_context))
    able = sum(
        seen(motion[None, 0])[0][1] == seen(target[None])[0][1] - 2 and seen(target[None])[0][1] >= 2
        for motion, target in zip(batch.motion_frames, batch.target, strict=True)
    )
    assert 0.3 * able < len(lead.index) < 0.7 * able
