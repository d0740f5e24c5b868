"""Pictures in another frame, with their boxes, points and poses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dheads.extensions.pose import done, relative
from dheads.extensions.warp import sampled
from dheads.training.geometry import Geometry

SIZE = 64


def random(count: int, seed: int = 0) -> Geometry:
    return Geometry.random(count, SIZE, torch.Generator().manual_seed(seed))


def smooth_pictures(count: int) -> Tensor:
    coarse = torch.rand((count, 3, 6, 6), generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=True)


def test_none_leaves_everything_as_it_is() -> None:
    frames, boxes = smooth_pictures(4)[:, None], torch.tensor([[[10.0, 20.0, 30.0, 50.0]]]).repeat(4, 1, 1)
    points, pose = torch.rand(4, 9, 2) * 2 - 1, 0.1 * torch.randn(4, 3, 6)
    geometry = Geometry.none(4)
    torch.testing.assert_close(geometry.pictures(frames), frames, rtol=0, atol=1e-5)
    assert torch.equal(geometry.boxes(boxes, SIZE), boxes)
    torch.testing.assert_close(geometry.points(points), points)
    torch.testing.assert_close(geometry.poses(pose), pose)


def test_points_go_where_their_pixels_go() -> None:
    """Mirrored, turned, scaled, shifted and bent: the picture's value at a point is found at the point moved."""
    geometry, pictures = random(32), smooth_pictures(32)
    points = torch.rand((32, 20, 2), generator=torch.Generator().manual_seed(2)) * 1.2 - 0.6
    changed = geometry.pictures(pictures[:, None])[:, 0]
    there = sampled(changed, geometry.points(points)[:, None])
    assert (there - sampled(pictures, points[:, None])).abs().max() < 0.05
    assert 4 < geometry.mirrored.sum() < 28


def test_about_a_pose_the_head_is_where_the_mean_face_is() -> None:
    pose = torch.tensor([[0.2, 0.3, 0.1, -0.1, 0.0, 0.0]]).repeat(8, 1)
    face = torch.tensor([[[-0.3, -0.2], [0.3, -0.2], [0.0, 0.4]]]).repeat(8, 1, 1)
    framed = Geometry.none(8).about(pose)
    torch.testing.assert_close(framed.points(done(pose[:, None], face)), face)
    varied = random(8).about(pose).points(done(pose[:, None], face))
    varied[..., 0] *= torch.where(random(8).mirrored, -1.0, 1.0)[:, None]
    assert 0.005 < (varied - face).abs().mean() < 0.1, "near it"


@pytest.mark.parametrize("about", [False, True])
def test_poses_go_with_their_pictures(about: bool) -> None:
    """A relative pose in the new frame leads from the moved points of one picture to those of the other."""
    photo, frame = 0.1 * torch.randn((2, 16, 6), generator=torch.Generator().manual_seed(3))
    geometry = random(16)
    geometry = Geometry(geometry.frame, geometry.mirrored)  # the bend does not count
    geometry = geometry.about(photo) if about else geometry
    pose = geometry.poses(relative(frame, photo))
    face = torch.rand((16, 9, 2), generator=torch.Generator().manual_seed(4)) - 0.5
    in_photo, in_frame = (geometry.points(done(one[:, None], face)) for one in (photo, frame))
    torch.testing.assert_close(done(pose[:, None], in_photo), in_frame)
