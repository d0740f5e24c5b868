"""The photo moved: its pixels are taken to where the pose code says the head is, and the network adds the rest.

A similarity moves the photo as the head moves, rigidly; the network sees the result, and adds a flow, for what turns
and bends. Of every pixel it says how much is its own, how much the photo in place (the background), and how much the
photo moved; around the mouth, whose mask moves with the head, all is its own: with shares of the photo moved there,
mouths on photos opened by a third less. In sampling the photo's shares are favoured, except around eyes while they
blink: what a network draws by itself is softer than the photo, and errors can accumulate in it. And the photo in place
serves as the background only, never where its head is.
Every frame is sampled from the photo, so nothing accumulates over a video.
Why: pixels copied from the same place keep a head from moving, and a face that the network draws whole is soft.
Off: extensions.warp.flow = false.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dheads.config import Config
from dheads.extensions.copying import eye_ellipses, face_ellipse, head_ellipse, mouth_ellipse, pixel_grid
from dheads.extensions.pose import undone

_NEVER = 30.0  # taken from a logit, leaves no share


@dataclass(frozen=True, eq=False)
class MovedPhoto:
    """The photo moved rigidly, for a batch."""

    grid: Tensor  # (B, H, W, 2) where each pixel comes from in the photo, -1 to 1
    picture: Tensor  # (B, 3, H, W)
    mask: Tensor  # (B, 1, H, W) in [0, 1], 1 around the mouth
    favour: Tensor  # (B, 2, H, W) added to the logits of the photo's shares, in place and moved
    bends: Tensor  # (B, 1, H, W) in [0, 1], 1 where the network's flow counts

    def map(self, change: Callable[[Tensor], Tensor]) -> MovedPhoto:
        """The same with every tensor changed alike."""
        values = self.grid, self.picture, self.mask, self.favour, self.bends
        return MovedPhoto(*(change(value) for value in values))


def moved_photo(
    config: Config, photo: Tensor, pose: Tensor, favour: float = 0.0, blink: Tensor | None = None
) -> MovedPhoto:
    """The photo (B, 3, H, W) moved by the pose (B, 6).

    favour: of its shares, away from eyes that blink (WarpConfig); blink (B,): how far they do, 0 .. 1; None: all do.
    """
    grid = moved_grid(photo, pose)
    mouth = mouth_ellipse(config.alignment, grid)[:, None]
    favoured, bends = torch.zeros_like(mouth).repeat(1, 2, 1, 1), torch.ones_like(mouth)
    if favour:
        # What a network draws of a background that a head has uncovered is blotched; the photo has some.
        beyond = 2 * _NEVER * (1 - face_ellipse(config.alignment, grid))
        eyes = eye_ellipses(config.alignment, grid)
        if blink is not None:
            eyes = eyes * blink[:, None, None]
        moved = favour * (1 - eyes) + beyond
        # Where a head has left its place, the photo in place still shows its ear.
        head = head_ellipse(config.alignment, pixel_grid(photo.shape[-1], photo.device))
        favoured = torch.stack([moved - _NEVER * head, moved], 1)
        # Beyond the head the flow means nothing: there training took what the network drew.
        bends = head_ellipse(config.alignment, grid)[:, None]
    return MovedPhoto(grid, sampled(photo, grid), mouth, favoured, bends)


def moved_grid(photo: Tensor, pose: Tensor) -> Tensor:
    """Where each pixel of the photo (B, 3, H, W) moved by the pose (B, 6) comes from, (B, H, W, 2)."""
    return undone(pose[:, None, None], pixel_grid(photo.shape[-1], photo.device))


def sampled(picture: Tensor, grid: Tensor, mode: str = "bicubic") -> Tensor:
    """The picture (B, C, H, W) at the points of a grid (B, H', W', 2); beyond the edge, its mirror image."""
    device = picture.device
    if device.type == "mps":
        picture, grid = picture.cpu(), grid.cpu()  # not every version of PyTorch samples bicubically there
    # Edge pixels repeated would be streaks of hair above a head that moves down.
    return F.grid_sample(picture, grid, mode=mode, padding_mode="reflection", align_corners=False).to(device)


def flowing(grid: Tensor, flow: Tensor, bends: Tensor) -> Tensor:
    """A grid (B, H, W, 2) with the network's flow (B, 2, h, w) px of the grid added, enlarged bilinearly.

    bends (B, 1, H, W): factor of the flow.
    """
    size = grid.shape[1]
    return grid + (bends * resized(flow, size, "bilinear")).permute(0, 2, 3, 1) * (2 / size)


def shares(gates: Tensor, photo: MovedPhoto) -> Tensor:
    """How much of each pixel is the network's own, the photo in place and the photo moved, (B, 3, H, W).

    gates (B, 2, H, W): logits of the latter two. Around the mouth all is its own.
    """
    outside = F.softmax(F.pad(gates + photo.favour, (0, 0, 0, 0, 1, 0)), dim=1) * (1 - photo.mask)
    return torch.cat([outside[:, :1] + photo.mask, outside[:, 1:]], 1)


@dataclass(frozen=True, eq=False)
class Taken:
    """What frames take from the photo."""

    grid: Tensor  # (B, H, W, 2) where the photo moved comes from in the photo, -1 to 1
    share: Tensor  # (B, 3, H, W), as `shares` has it

    def map(self, change: Callable[[Tensor], Tensor]) -> Taken:
        """The same with every tensor changed alike."""
        return Taken(change(self.grid), change(self.share))

    def of(self, numbers: list[int]) -> Taken:
        """What these frames of the batch take."""
        return self.map(lambda values: values[numbers])


def taken_from(photo: MovedPhoto, gates: Tensor, flow: Tensor) -> Taken:
    """What the network's gates (B, 2, H, W) and flow (B, 2, h, w) px take from the photo, in float32."""
    return Taken(flowing(photo.grid, flow.float(), photo.bends), shares(gates.float(), photo))


def blended(x_0: Tensor, photo: Tensor, moved: Tensor, share: Tensor) -> Tensor:
    """x_0 = g_0 x_0 + g_1 x_Id + g_2 warp(x_Id), (B, 3, H, W) each; share: the g of `shares`."""
    return share[:, :1] * x_0 + share[:, 1:2] * photo + share[:, 2:] * moved


def enlarged_grid(grid: Tensor, size: int) -> Tensor:
    """A grid (B, H, W, 2) of points from -1 to 1 for pictures of another size, (B, S, S, 2)."""
    # Enlarged as an offset, which hardly changes in the outermost half pixel.
    offset = grid - pixel_grid(grid.shape[1], grid.device)
    offset = resized(offset.permute(0, 3, 1, 2).contiguous(), size, "bilinear")
    return pixel_grid(size, grid.device) + offset.permute(0, 2, 3, 1)


def resized(picture: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """A picture (B, C, H, W) as (B, C, S, S)."""
    if picture.shape[-1] == size:
        return picture
    # With antialias PyTorch resizes along one axis after the other, which takes half of the time when it enlarges too.
    return F.interpolate(picture, (size, size), mode=mode, align_corners=False, antialias=mode == "bicubic")


def landmark_error(grid: Tensor, points: Tensor, sources: Tensor) -> Tensor:
    """How far from the photo's landmarks the grid reaches at the frame's landmarks, px^2, (B,).

    grid (B, H, W, 2); points and sources (B, P, 2) from -1 to 1: landmarks of the frame and of the photo.
    """
    reached = sampled(grid.permute(0, 3, 1, 2), points[:, None], "bilinear")[:, :, 0].transpose(1, 2)  # (B, P, 2)
    return ((reached - sources) * grid.shape[1] / 2).square().sum(-1).mean(-1)
