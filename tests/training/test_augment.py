"""Augmentation of pictures, and drift and holes of motion frames."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dheads.extensions.motion import drift, punch_holes
from dheads.training.augment import _jpeg, _occlusion, altered
from dheads.training.geometry import Geometry


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augment(frames: Tensor, box: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames and boxes changed in every way."""
    geometry = Geometry.random(len(frames), frames.shape[-1], generator, frames.device)
    return altered(geometry.pictures(frames), generator), geometry.boxes(box.to(frames.device), frames.shape[-1])


def boxes(count: int, x0: int, y0: int, x1: int, y1: int) -> Tensor:
    return torch.tensor([[x0, y0, x1, y1]], dtype=torch.float32).repeat(count, 1, 1)


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
    """A bright spot in the box, off the middle, stays in the box, even where the picture is mirrored and moved."""
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
    moved = moved[:, 0]
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


def test_holes_are_patches_in_some_examples_the_same_in_all_frames() -> None:
    frames = punch_holes(torch.ones(400, 2, 3, 32, 32), 0.25, generator(8))
    assert torch.equal(frames[:, 1], frames[:, 0])
    patches = frames[:, 0].unflatten(3, (8, 4)).unflatten(2, (8, 4))  # (B, 3, 8, 4, 8, 4)
    assert torch.equal(patches.amin((1, 3, 5)), patches.amax((1, 3, 5))), "whole patches of 4 x 4 px"
    dropped = 1 - patches.mean((1, 2, 3, 4, 5))
    assert 0.15 < (dropped > 0).float().mean() < 0.3
    assert 0.15 < dropped[dropped > 0].mean() < 0.35
    assert dropped.max() < 0.75
    assert torch.equal(punch_holes(torch.ones(8, 2, 3, 32, 32), 0.0, generator(8)), torch.ones(8, 2, 3, 32, 32))


def test_parts_of_some_pictures_are_covered() -> None:
    count = 300
    grey = torch.linspace(-1, 1, count)[:, None, None, None, None].expand(count, 2, 3, 32, 32)
    changed = _occlusion(grey, generator(9))
    hidden = (changed[:, 0, 0] - grey[:, 0, 0]).abs() > 0.01  # (B, 32, 32)
    some = hidden.any(2).any(1)
    assert 0.04 < some.float().mean() < 0.12
    share = hidden[some].float().mean((1, 2))
    assert 0.02 < share.mean() < 0.3
    assert share.max() < 0.6
    assert torch.equal(changed[:, 0], changed[:, 1])


def test_some_pictures_are_compressed_as_jpeg() -> None:
    given = torch.rand(200, 2, 3, 32, 32, generator=generator()) * 2 - 1
    changed = _jpeg(given, generator(10))
    error = (changed - given).abs().mean((1, 2, 3, 4))
    assert 0.08 < (error > 0).float().mean() < 0.25
    assert error[error > 0].min() > 0.02
    assert changed.abs().max() <= 1
    smooth = torch.linspace(-1, 1, 32).expand(200, 1, 3, 32, 32)
    assert (_jpeg(smooth, generator(10)) - smooth).abs().mean((1, 2, 3, 4)).max() < 0.05, (
        "smooth pictures change little"
    )


def test_a_box_at_the_edge_stays_in_the_picture_and_is_not_empty() -> None:
    given = torch.zeros(64, 1, 3, 32, 32)
    _, moved = augment(given, boxes(64, 28, 29, 32, 32), generator(6))
    assert ((moved[..., :2] >= 0) & (moved[..., 2:] <= 32) & (moved[..., 2:] > moved[..., :2])).all()
    assert torch.equal(moved, moved.round())


class StaysOnTheDevice(TorchDispatchMode):
    """Fails where values of a tensor on the device are read."""

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        assert "_local_scalar_dense" not in str(func), "a number was read from the device"
        if isinstance(result, Tensor) and any(isinstance(value, Tensor) and value.is_meta for value in args):
            assert result.is_meta, f"{func} left the device"
        return result


def test_pictures_stay_on_their_device() -> None:
    """Tensors on "meta" have no values, so that reading one fails."""
    given = torch.empty(32, 3, 3, 32, 32, device="meta")
    with StaysOnTheDevice():
        frames, moved = augment(given, boxes(32, 10, 18, 22, 26), generator(2))
        motion = punch_holes(drift(frames[:, 1:], 1.0, generator(3)), 0.5, generator(4))
    assert frames.is_meta
    assert motion.is_meta
    assert moved.is_meta
