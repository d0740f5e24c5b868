"""Frames as layers: put together again they are the frame, and only the mouth is drawn anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dheads.config import override, preset
from dheads.extensions.mouth import SIZE, MouthNetwork, mouth_box
from dheads.extensions.warp import Taken, blended, moved_grid, resized, sampled
from dheads.sampling.layers import layer_size, layers

SMALL = preset("small")


def smooth(seed: int, count: int = 2) -> Tensor:
    """Pictures (count, 3, 128, 128) that resampling hardly changes."""
    coarse = torch.rand((count, 3, 6, 6), generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8
    return torch.nn.functional.interpolate(coarse, (128, 128), mode="bicubic", align_corners=True).clamp(-1, 1)


@pytest.fixture
def frame() -> tuple[Tensor, Taken, Tensor, Tensor]:
    """x_0, what it takes, the photo and the pose, of two frames."""
    photo, own = smooth(0), smooth(1)
    pose = torch.tensor([[0.0] * 6, [0.05, 0.1, 0.1, -0.1, 0, 0]])
    grid = moved_grid(photo, pose)
    share = smooth(2).softmax(1)
    return blended(own, photo, sampled(photo, grid), share), Taken(grid, share), photo, pose


def test_the_layers_add_up_to_the_frame(frame: tuple[Tensor, Taken, Tensor, Tensor]) -> None:
    x_0, taken, photo, pose = frame
    middle = resized(photo, SIZE)
    cut = layers(x_0, taken, photo, middle, None, SMALL.alignment, pose)
    assert cut.shape == (2, SIZE, SIZE, 7)
    drawn, own, in_place, offset = cut.permute(0, 3, 1, 2).split([3, 1, 1, 2], dim=1)
    base = torch.tensor(np.stack(np.meshgrid(*[(2 * np.arange(SIZE) + 1) / SIZE - 1] * 2), -1), dtype=torch.float32)
    moved = sampled(middle, base + offset.permute(0, 2, 3, 1))
    level = (middle + 1) * 127.5, (moved + 1) * 127.5
    whole = drawn + in_place * level[0] + (1 - own - in_place) * level[1]
    torch.testing.assert_close(whole, (resized(x_0, SIZE) + 1) * 127.5, rtol=0, atol=1.5)


def test_what_the_network_hardly_draws_is_the_photo(frame: tuple[Tensor, Taken, Tensor, Tensor]) -> None:
    _, taken, photo, pose = frame
    share = torch.full_like(taken.share, 0.495)
    share[:, :1] = 0.01
    x_0 = blended(smooth(1), photo, sampled(photo, taken.grid), share)
    x_0 = x_0 + 0.02 * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(3))  # as solvers add
    cut = layers(x_0, Taken(taken.grid, share), photo, resized(photo, SIZE), None, SMALL.alignment, pose)
    assert (cut[..., 3] - 0.002).abs().max() < 1e-5  # its share
    assert cut[..., :3].abs().mean() < 0.5  # of 255; the noise alone would be 2


def test_only_the_mouth_is_drawn_anew(frame: tuple[Tensor, Taken, Tensor, Tensor]) -> None:
    x_0, taken, photo, pose = frame
    torch.manual_seed(0)
    network = MouthNetwork(12)
    torch.nn.init.normal_(network.out.weight, std=0.1)
    middle = resized(photo, SIZE)
    with torch.no_grad():
        plain, drawn = (layers(x_0, taken, photo, middle, mouth, SMALL.alignment, pose) for mouth in (None, network))
    changed = (drawn - plain)[..., :3].abs().amax(-1)
    box = mouth_box(SMALL.alignment, pose)
    mask = box.put(torch.zeros(2, 1, SIZE, SIZE), box.mask)[:, 0]
    assert (changed[mask == 0] == 0).all()
    assert changed[mask == 1].mean() > 5
    assert torch.equal(drawn[..., 3:], plain[..., 3:])


def test_layers_are_never_smaller_than_the_networks_frames() -> None:
    assert layer_size(SMALL) == 256
    assert (
        layer_size(override(SMALL, {"network": {"image_size": 512}, "extensions": {"mouth": {"channels": 0}}})) == 512
    )
