"""Many videos at once, each as it would be by itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from test_engine import WARP, Tape, lively, sampled, tapes  # noqa: F401  (a fixture)
from torch import Tensor

from dheads.config import Config, override, preset
from dheads.errors import DheadsError
from dheads.extensions.copying import mouth_mask
from dheads.extensions.eyes import Blinks
from dheads.extensions.lips import LipPredictor
from dheads.extensions.pauses import CONTEXT
from dheads.sampling.engine import Engine, Inputs
from dheads.sampling.lockstep import VideoSpec, in_lockstep

TINY = preset("tiny")
MOUTH = mouth_mask(TINY.alignment, 32, torch.device("cpu"))[0, 0]  # (32, 32)


class Watched(Engine):
    """Records the size of every batch."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        super().__init__(lively(TINY), config, dtype)
        self.batches: list[int] = []

    def generate(self, inputs: Inputs, first: bool = True) -> Tensor:
        self.batches.append(len(inputs.identity))
        return super().generate(inputs, first)


def video(seed: int, frames: int) -> VideoSpec:
    random = np.random.default_rng(seed)
    photo = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return VideoSpec(photo, torch.randn(frames, 384, generator=torch.Generator().manual_seed(seed)), seed)


def frames_of(engine: Engine, videos: list[VideoSpec], slots: int) -> list[np.ndarray]:
    frames: list[list[np.ndarray]] = [[] for _ in videos]
    for index, frame, last in in_lockstep(engine, videos, slots):
        assert (frame.shape, frame.dtype) == ((32, 32, 3), np.uint8)
        frames[index].append(frame)
        assert last == (len(frames[index]) == len(videos[index].speech))
    return [np.stack(each) for each in frames]


LENGTHS = [2, 3, 1, 2]
DDPM = sampled(TINY, steps=3, solver="ddpm")
ONE = sampled(TINY, steps=1, solver="ddpm")
WARM = sampled(TINY, {"noise": {"warm_steps": 2}}, steps=5, solver="ddim")


CONFIGS = {"ddpm": DDPM, "warm": WARM}


@cache
def made_alone(name: str, dtype: torch.dtype) -> list[np.ndarray]:
    """Each of the videos by itself."""
    videos = [video(seed, frames) for seed, frames in enumerate(LENGTHS)]
    return [frames_of(Watched(CONFIGS[name], dtype), [one], 1)[0] for one in videos]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("slots", "dtype"), [(2, torch.float32), (8, torch.float32), (3, torch.bfloat16)])
def test_a_video_does_not_depend_on_what_shares_its_batch(name: str, slots: int, dtype: torch.dtype) -> None:
    videos = [video(seed, frames) for seed, frames in enumerate(LENGTHS)]
    alone = made_alone(name, dtype)
    together = frames_of(Watched(CONFIGS[name], dtype), videos, slots)
    for ours, wanted in zip(together, alone, strict=True):
        assert ours.shape == wanted.shape
        # Another batch size may round otherwise, and later frames build on earlier ones.
        assert np.abs(ours.astype(int) - wanted).max() <= (1 if dtype == torch.float32 else 16)
    assert not np.array_equal(alone[0][0], alone[1][0])


def test_free_slots_are_filled_as_videos_end() -> None:
    engine = Watched(DDPM)
    videos = [video(seed, frames) for seed, frames in enumerate([2, 4, 1, 3])]
    order = [index for index, _, _ in in_lockstep(engine, videos, 2)]
    assert engine.batches == [2, 2, 2, 2, 1, 1]
    assert order == [0, 1, 0, 1, 1, 2, 1, 3, 3, 3]


def test_first_frames_take_their_own_steps_where_the_others_start_warm() -> None:
    engine = Watched(WARM)
    videos = [video(seed, frames) for seed, frames in enumerate([2, 3, 2])]
    order = [index for index, _, _ in in_lockstep(engine, videos, 2)]
    assert sorted(order) == [0, 0, 1, 1, 1, 2, 2]
    assert engine.batches == [2, 2, 1, 1, 1], "both begin, both go on, the third begins while the second ends"


@pytest.mark.parametrize("sizes", [1, 2, 5, 100])
@pytest.mark.parametrize("frames", [1, 3, 12])
def test_speech_in_chunks_gives_the_frames_of_the_whole(frames: int, sizes: int) -> None:
    whole = video(0, frames)
    (wanted,) = frames_of(Watched(ONE), [whole], 1)
    assert len(wanted) == frames
    chunks = replace(whole, speech=iter(whole.speech.split(sizes)))
    yielded = list(in_lockstep(Watched(ONE), [chunks]))
    assert np.array_equal(np.stack([frame for _, frame, _ in yielded]), wanted)
    assert [last for _, _, last in yielded] == [False] * (frames - 1) + [True]


def test_no_more_speech_is_held_than_a_frame_needs() -> None:
    arrays: list[weakref.ref] = []

    def endless() -> Iterator[Tensor]:
        random = np.random.default_rng(0)
        while True:
            array = random.standard_normal((4, 384), dtype=np.float32)
            arrays.append(weakref.ref(array))
            yield torch.from_numpy(array)
            del array

    reach = CONTEXT + LipPredictor.context
    assert reach > TINY.conditioning.audio_context + TINY.extensions.codes["lips"].context > 0
    frames = in_lockstep(Watched(ONE), [replace(video(0, 0), speech=endless())])
    assert arrays == []
    for k in range(40):
        next(frames)
        assert len(arrays) == (k + reach) // 4 + 1, "read when it is needed"
        assert sum(array() is not None for array in arrays) <= 1, "copied into what is held, which is as short"


def test_a_stopped_video_frees_its_slot() -> None:
    engine, stopped, yielded = Watched(DDPM), set(), []
    videos = [video(seed, frames) for seed, frames in enumerate([100, 3, 2])]
    for index, _, last in in_lockstep(engine, videos, 2, stopped):
        yielded.append((index, last))
        if yielded.count((0, False)) == 2:
            stopped.add(0)
    assert yielded == [(0, False), (1, False), (0, False), (1, False), (1, True), (2, False), (2, True)]
    assert engine.batches == [2, 2, 2, 1]


def test_a_recorded_frame_of_a_stopped_video_is_dropped(tapes: list[Tape]) -> None:  # noqa: F811
    engine, stopped = Watched(DDPM), set()
    engine.records = True
    yielded = []
    for index, _, _ in in_lockstep(engine, [video(0, 100), video(1, 4)], 2, stopped):
        yielded.append(index)
        stopped.add(0)
    assert yielded == [0, 1, 1, 1, 1]


def test_videos_are_taken_when_a_slot_is_free() -> None:
    taken: list[int] = []

    def videos() -> Iterator[VideoSpec]:
        for seed in range(3):
            taken.append(seed)
            yield video(seed, 2)

    frames = in_lockstep(Watched(DDPM), videos(), 2)
    assert taken == []
    next(frames)
    assert taken == [0, 1]
    assert len(list(frames)) == 5
    assert taken == [0, 1, 2]


def test_frames_that_are_not_finite_are_refused() -> None:
    """As bytes of a picture, NaN would be black."""
    unet = lively(TINY)
    engine = Engine(unet, sampled(TINY, steps=2, solver="ddpm"), torch.float32)
    with torch.no_grad():
        engine._stems[0][0].bias[3] = torch.nan
    with pytest.raises(DheadsError, match=r"numbers that are not finite; leave out --compile, choose other weights"):
        next(in_lockstep(engine, [video(0, 3)]))


def test_a_video_without_sound_has_no_frames() -> None:
    videos = [video(0, 0), video(1, 2), video(2, 0)]
    assert [index for index, _, _ in in_lockstep(Watched(DDPM), videos, 2)] == [1, 1]
    assert list(in_lockstep(Watched(DDPM), [], 2)) == []


def test_recorded_frames_are_the_same_and_come_one_step_later(tapes: list[Tape]) -> None:  # noqa: F811
    """As on CUDA: all batches have one size, and the device computes while earlier frames are taken."""
    videos = [video(seed, frames) for seed, frames in enumerate(LENGTHS)]
    wanted = frames_of(Watched(DDPM), videos, 3)
    engine = Watched(DDPM)
    engine.records = True
    frames = in_lockstep(engine, videos, 3)
    next(frames)
    assert len(engine.batches) == 2
    ours = frames_of(engine, videos, 3)
    assert set(engine.batches) == {3}
    assert len(tapes) == 1
    for mine, other in zip(ours, wanted, strict=True):
        assert np.abs(mine.astype(int) - other).max() <= 1


# --- Random numbers


class Noted(Watched):
    """Records the noise, the sound and the eye codes of every frame."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.noise: list[Tensor] = []
        self.sound: list[Tensor] = []
        self.eyes: list[Tensor] = []

    def generate(self, inputs: Inputs, first: bool = True) -> Tensor:
        self.noise.append(inputs.noise)
        self.sound.append(inputs.cues.audio_window)
        self.eyes.append(inputs.cues.codes["eyes"])
        return super().generate(inputs, first)


def following(values: Tensor) -> float:
    """The mean correlation of a frame with the one before it, (F, ...)."""
    return float(torch.corrcoef(values.flatten(1)).diagonal(1).mean())


@pytest.mark.parametrize(("share", "outer"), [(0.0, 0.0), (0.5, 0.9), (1.0, 0.25)])
def test_a_share_of_the_noise_is_that_of_the_frame_before(share: float, outer: float) -> None:
    """x_T stays standard normal and forgets earlier frames; the noise that the solver adds is each frame's own."""
    engine = Noted(sampled(DDPM, {"noise": {"shared": share, "outer_shared": outer}}))
    frames_of(engine, [video(1, 30)], 1)
    x_T = torch.cat([noise[:, 0] for noise in engine.noise])  # (F, 3, H, W)
    added = torch.cat([noise[:, 1] for noise in engine.noise])
    assert x_T.std() == pytest.approx(1, abs=0.03)
    for values, where, wanted in ((x_T, MOUTH == 1, share), (x_T, MOUTH == 0, outer), (added, MOUTH == 1, 0.0)):
        inside = values[:, :, where].flatten(1)  # (F, n)
        alike = torch.corrcoef(inside)
        for lag in (1, 4):
            assert alike.diagonal(lag).mean() == pytest.approx(wanted ** (lag / 2), abs=0.05)
        assert inside.var() == pytest.approx(1, abs=0.1)


def test_the_temperatures_scale_x_T_around_the_mouth_and_outside() -> None:
    engine = Noted(sampled(DDPM, {"noise": {"outer_shared": 0.9, "temperature": 0.7, "outer_temperature": 0.5}}))
    frames_of(engine, [video(1, 30)], 1)
    noise = torch.cat(engine.noise)  # (F, N, 3, H, W)
    spreads = [noise[:, which][..., where].std() for which in (0, 1) for where in (MOUTH == 1, MOUTH == 0)]
    assert [float(spread) for spread in spreads] == pytest.approx([0.7, 0.5, 1, 1], abs=0.06)
    assert following(noise[:, 0][..., MOUTH == 0]) == pytest.approx(0.9**0.5, abs=0.05)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_in_pauses_noise_is_shared_everywhere_and_the_sound_is_its_mean(share: float) -> None:
    engine = Noted(sampled(ONE, {"noise": {"shared": 0.5, "pause_shared": share}}))
    # One lip code is the first number of the embedding: it changes by 0.01 a frame, and by 1 in speech.
    engine.unet.lip_predictor.weight[LipPredictor.context * TINY.conditioning.speech_dim, 0] = 1
    speech = torch.zeros(60, 384)
    speech[:, 0] = torch.arange(60) * 0.01
    speech[30::2, 0] += 3
    frames_of(engine, [replace(video(1, 60), speech=speech)], 1)
    x_T = torch.cat([noise[:, 0] for noise in engine.noise])  # (F, 3, H, W)
    pause, spoken = slice(0, 30 - CONTEXT), slice(30 + CONTEXT, None)
    for values, wanted in ((x_T[pause][:, :, MOUTH == 0], share), (x_T[pause][:, :, MOUTH == 1], max(0.5, share))):
        assert following(values) == pytest.approx(wanted**0.5, abs=0.05)
    assert following(x_T[spoken][:, :, MOUTH == 0]) == pytest.approx(0, abs=0.05)
    inner = engine.sound[15][0, :, 0]  # of embeddings 13 .. 17, with those of 6 .. 24 around the frame
    assert inner.tolist() == pytest.approx([0.15] * 5 if share else [0.13, 0.14, 0.15, 0.16, 0.17])
    assert torch.equal(engine.sound[45][0], speech[43:48])


def test_eyes_blink_by_chance_or_as_given() -> None:
    config = sampled(TINY, steps=1, solver="ddim")
    engine = Noted(config)
    spec = video(5, 60)
    frames_of(engine, [spec], 1)
    chance = Blinks(5, 0.3)
    windows = [chance.window(frame, spec.speech, frame, 2) for frame in range(60)]
    assert all(torch.equal(given[0], wanted) for given, wanted in zip(engine.eyes, windows, strict=True))
    assert min(float(given.min()) for given in engine.eyes) < -0.25
    deeper = Noted(override(config, {"extensions": {"codes": {"eyes": {"gain": 1.5}}}}))
    frames_of(deeper, [spec], 1)
    assert all(torch.equal(1.5 * a, b) for a, b in zip(engine.eyes, deeper.eyes, strict=True))
    code = torch.linspace(-1, 0, 4)[:, None]
    engine = Noted(override(config, {"extensions": {"codes": {"eyes": {"gain": 1.5}}}}))
    frames_of(engine, [replace(video(5, 4), codes={"eyes": code})], 1)
    assert engine.eyes[0][0, :, 0].tolist() == pytest.approx([-1, -1, -1, -2 / 3, -1 / 3])


def test_layers_and_frames_share_a_batch() -> None:
    """Each video has what it has alone."""
    torch.manual_seed(0)
    engine = Engine(lively(WARP), sampled(WARP, steps=2), torch.float32)
    middle = np.random.default_rng(5).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    videos = [replace(video(seed, 3), middle=given) for seed, given in enumerate((middle, None, 255 - middle))]
    shown: list[list[np.ndarray]] = [[], [], []]
    for index, frame, _ in in_lockstep(engine, videos, 3):
        shown[index].append(frame)
    for spec, frames, shape in zip(videos, shown, ((256, 256, 7), (32, 32, 3), (256, 256, 7)), strict=True):
        alone = [frame for _, frame, _ in in_lockstep(engine, [spec])]
        assert np.stack(frames).shape == (3, *shape)
        assert np.abs(np.stack(frames).astype(float) - np.stack(alone)).max() <= 1
