"""Training of the mouth network: it learns, and nothing else of the weights changes."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from conftest import program

from dheads.conditioning import Cues
from dheads.config import Config, override, preset
from dheads.extensions.network import ExtendedUNet
from dheads.training.batches import Batch

FEW = {"network": {"model_channels": 32, "head_channels": 32}, "extensions": {"mouth": {"channels": 16}}}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return program("recipes/train_mouth.py")


@pytest.fixture
def config() -> Config:
    return override(preset("small"), FEW)


def batch(config: Config, count: int = 2) -> Batch:
    """Smooth faces of noise at 256 px with fine stripes over the mouth, which only the target has."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((count, 3, 8, 8), generator=generator) - 0.5
    photo = torch.nn.functional.interpolate(coarse, (256, 256), mode="bicubic")
    target = photo.clone()
    target[:, :, 170:220, 90:166] += 0.3 * (torch.arange(76) // 2 % 2 - 0.5)
    codes = {
        name: torch.zeros(count, 2 * table.context + 1, dims)
        for (name, table), dims in zip(config.extensions.codes.items(), (3, 1, 6), strict=True)
    }
    cues = Cues(torch.randn((count, 5, config.conditioning.speech_dim), generator=generator), codes)
    box = torch.tensor([[90, 170, 166, 220]]).expand(count, 4)
    frames = photo[:, None].repeat(1, config.conditioning.motion_frames, 1, 1, 1)
    return Batch(target, photo, frames, cues, box, {}, ["x"] * count)


def test_the_mouth_network_learns_and_the_rest_stays(recipe: ModuleType, config: Config) -> None:
    torch.manual_seed(0)
    unet = ExtendedUNet(config).eval()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    training, example = recipe.Training(unet, config, 0.03, 0.02), batch(config, 1)
    first = training.judged([example])
    for _ in range(20):
        training.step(example, 0.0)
    last = training.judged([example])
    assert first["error"] == pytest.approx(first["error_enlarged"], rel=0.1), "it begins without effect"
    assert last["error"] < 0.9 * last["error_enlarged"]
    assert last["detail"] > 1.2 * last["detail_enlarged"]
    changed = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("mouth.") for name in changed)
    assert training.picture(batch(config)).size == (2 * 6 * 132, 112)


def test_outside_the_mouth_the_truth_is_what_is_shown(recipe: ModuleType, config: Config) -> None:
    unet = ExtendedUNet(config).eval()
    example = recipe.Drawing(unet, config)(batch(config))
    outside = example.mask.expand_as(example.truth) == 0
    assert torch.equal(example.truth[outside], example.enlarged[outside])
    inside = example.mask.expand_as(example.truth) == 1
    assert not torch.equal(example.truth[inside], example.enlarged[inside])
    shown = example.drawn_by(unet.mouth)
    assert torch.equal(shown[outside], example.enlarged[outside])


def test_faces_are_drawn_with_the_lips_of_others_too(recipe: ModuleType, config: Config) -> None:
    torch.manual_seed(0)
    unet = ExtendedUNet(config).eval()
    drawing, example = recipe.Drawing(unet, config), batch(config)
    example.cues.codes["lips"][1] = 2.0
    given = []
    drawing._drawn = lambda batch, cues, *_: given.append(cues)
    drawing.with_other_lips(example)
    assert torch.equal(given[0].codes["lips"], example.cues.codes["lips"].flip(0))
    assert torch.equal(given[0].audio_window, example.cues.audio_window.flip(0))
    assert torch.equal(given[0].codes["pose"], example.cues.codes["pose"])


def test_a_mouth_that_is_opened_differently_costs(recipe: ModuleType, config: Config) -> None:
    torch.manual_seed(0)
    drawing = recipe.Drawing(ExtendedUNet(config).eval(), config)
    example = drawing.with_other_lips(batch(config))
    assert drawing.opening_error(example, example.enlarged).item() == pytest.approx(0, abs=1e-8)
    shown = torch.rand_like(example.enlarged).requires_grad_()
    error = drawing.opening_error(example, shown)
    assert error.item() > 1e-6
    (gradient,) = torch.autograd.grad(error, shown)
    assert gradient.abs().max() > 0


def test_a_share_of_the_first_weights_may_be_kept(recipe: ModuleType, config: Config) -> None:
    torch.manual_seed(0)
    training = recipe.Training(ExtendedUNet(config).eval(), config, 0.03, 0.02, keep=0.25)
    first = training.average.up.weight.clone()
    with torch.no_grad():
        training.average.up.weight += 1
    training.finish()
    torch.testing.assert_close(training.average.up.weight, first + 0.75)
