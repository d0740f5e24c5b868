"""The gain of the lip code that each face gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dheads.config import Config, override, preset
from dheads.extensions.network import ExtendedUNet
from dheads.media.pixels import to_unit
from dheads.sampling import calibration
from dheads.sampling.calibration import lip_gain
from dheads.sampling.engine import Engine
from dheads.sampling.lockstep import VideoSpec, in_lockstep
from dheads.sampling.portrait import find_portrait
from dheads.sampling.staging import staged
from dheads.sampling.talker import Talker, load

SHOWN = 1.0


@pytest.fixture(scope="module")
def talker() -> Talker:
    return load(device="cpu", progress=False)


def crop(talker: Talker, photo: Path) -> np.ndarray:
    portrait = find_portrait(photo, talker.config, talker.backend)
    return staged(talker.config, portrait, None).photo


def engine_for(talker: Talker, shown: float, gain: float = 1.15) -> Engine:
    return Engine(
        talker.unet, override(talker.config, {"extensions": {"codes": {"lips": {"gain": gain, "shown": shown}}}})
    )


def test_mouths_that_open_little_are_given_more(talker: Talker, shared: Path) -> None:
    gains = []
    for name in ("260", "000", "160"):  # a broad smile, a head that is turned, a neutral face
        identity = to_unit(crop(talker, shared / "data" / "stills" / f"{name}.jpg"))[None]
        gains.append(lip_gain(engine_for(talker, SHOWN), identity, 1))
    assert gains[0] > 1.3 * gains[1]
    assert gains[1] > 1.3 * gains[2]


@pytest.mark.parametrize(("slope", "gain"), [(SHOWN, 1.0), (0.5 * SHOWN, 2**0.75), (-0.1, 5.0), (9.0, 0.6)])
def test_the_gain_makes_up_for_the_slope(
    talker: Talker, monkeypatch: pytest.MonkeyPatch, slope: float, gain: float
) -> None:
    predictor = talker.unet.lip_predictor
    assert predictor is not None
    told = torch.stack([predictor.opening(trial)[5] for trial in predictor.trials]).numpy()
    monkeypatch.setattr(calibration, "_frames", lambda *_: [])
    monkeypatch.setattr(calibration, "_openings", lambda *_: 0.1 + slope * told)
    assert lip_gain(engine_for(talker, SHOWN), torch.zeros(1, 3, 128, 128), 1) == pytest.approx(gain, rel=1e-4)


def test_batches_and_calls_give_the_same_gain(talker: Talker, examples: Path) -> None:
    identity = to_unit(crop(talker, examples / "face.jpg"))[None]
    engine = engine_for(talker, SHOWN)
    gain = lip_gain(engine, identity, 1)
    assert 0.8 < gain < 2.2
    assert lip_gain(engine, identity, 4) == pytest.approx(gain, rel=0.02)


def test_a_face_is_tried_once_in_a_list(talker: Talker, examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(calibration, "lip_gain", lambda engine, identity, slots: tried.append(slots) or 1.5)
    photo = crop(talker, examples / "face.jpg")
    speech = torch.zeros(1, talker.config.conditioning.speech_dim)
    videos = [VideoSpec(face, speech, seed) for seed, face in enumerate((photo, photo, np.fliplr(photo).copy(), photo))]
    assert len(list(in_lockstep(engine_for(talker, SHOWN), videos, 2))) == 4
    assert tried == [2, 2]


def test_without_a_goal_a_face_or_trials_the_gain_is_the_configured_one(talker: Talker, examples: Path) -> None:
    photo, noise = crop(talker, examples / "face.jpg"), torch.rand(1, 3, 128, 128) * 2 - 1
    assert lip_gain(engine_for(talker, 0.0), to_unit(photo)[None], 1) == 1.15
    assert lip_gain(engine_for(talker, SHOWN, 1.3), noise, 6) == 1.3
    engine = engine_for(talker, SHOWN, 1.2)
    trials = talker.unet.lip_predictor.trials
    kept = trials.clone()
    try:
        trials.zero_()
        assert lip_gain(engine, to_unit(photo)[None], 1) == 1.2
    finally:
        trials.copy_(kept)


def small_network() -> ExtendedUNet:
    torch.manual_seed(0)
    return ExtendedUNet(small_config())


def small_config() -> Config:
    return override(preset("tiny"), {"extensions": {"codes": {"lips": {}}}})


def test_weights_that_are_older_than_the_trials_load() -> None:
    unet = small_network()
    assert unet.lip_predictor is not None
    unet.lip_predictor.trials.fill_(1)
    older: dict[str, Tensor] = {name: value for name, value in unet.state_dict().items() if "trials" not in name}
    copy = small_network()
    copy.load_state_dict(older)
    assert copy.lip_predictor is not None
    assert not copy.lip_predictor.trials.any()
    assert all(torch.equal(value, older[name]) for name, value in copy.state_dict().items() if name in older)
