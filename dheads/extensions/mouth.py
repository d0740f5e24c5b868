"""The mouth network: lips, teeth and chin at 256 px, in videos larger than the network's own frames.

Around the mouth all is the U-Net's own (warp.py), so a frame that is enlarged is a soft patch there in a face as sharp
as the photo. This network sees the enlarged frame and the photo moved, at 256 px in a box that follows the mouth, and
says what to add and, of every pixel, how much of the photo moved to take: beards and skin come from there. What it
draws is shown, and never becomes a motion frame, so nothing accumulates.
Why: an enlarged mouth has a fifth of a true mouth's detail, one drawn so nine tenths. Trained by itself, by
recipes/train_mouth.py.
Off: extensions.mouth.channels = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dheads.config import AlignmentConfig
from dheads.extensions.copying import mouth_ellipse
from dheads.extensions.pose import done, undone
from dheads.model import zero_init

SIZE = 256  # px, of a side of the pictures in which the mouth is drawn
_MARGIN = 1.2  # of the box about the mouth's ellipse, which a head that tilts or comes nearer also stays within
_FADE_PX = 6  # at the box's border
_UNTOUCHED = 4.0  # logit of a pixel's own share, before training


class Block(nn.Module):
    """Two convolutions, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = zero_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, h: Tensor) -> Tensor:
        """h (B, C, H, W)."""
        out: Tensor = h + self.second(F.silu(self.first(F.silu(h))))
        return out


class MouthNetwork(nn.Module):
    """Convolutions on patches of 2 px and, between them, on patches of 4 px, where most of the work is done."""

    def __init__(self, channels: int) -> None:
        """channels: width on patches of 4 px; half of it on patches of 2 px. Begins without effect."""
        super().__init__()
        fine = channels // 2
        self.stem = nn.Conv2d(4 * (3 + 3 + 1), fine, 3, padding=1)
        self.fine_in = Block(fine)
        self.down = nn.Conv2d(4 * fine, channels, 1)
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(4)))
        self.up = nn.Conv2d(channels, 4 * fine, 1)
        self.fine_out = Block(fine)
        self.out = zero_init(nn.Conv2d(fine, 4 * (3 + 1), 3, padding=1))

    def forward(self, frame: Tensor, moved: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """frame, moved (B, 3, h, w): the frame enlarged and the photo moved; mask (B, 1, h, w), 1 around the mouth.

        Returns what to add (B, 3, h, w), and logits (B, 1, h, w) of how much of `moved` to take first.
        """
        fine = self.fine_in(self.stem(F.pixel_unshuffle(torch.cat([frame, moved, mask], 1), 2)))
        wide = self.blocks(self.down(F.pixel_unshuffle(fine, 2)))
        fine = self.fine_out(fine + F.pixel_shuffle(self.up(wide), 2))
        added, logits = F.pixel_shuffle(self.out(fine), 2).split([3, 1], dim=1)
        return added, logits - _UNTOUCHED


@dataclass(frozen=True, eq=False)
class MouthBox:
    """Where the mouths of a batch are in pictures of SIZE px."""

    rows: Tensor  # (B, h) of the picture
    columns: Tensor  # (B, w)
    mask: Tensor  # (B, 1, h, w) in [0, 1], 1 around the mouth, 0 at the border

    def cut(self, pictures: Tensor) -> Tensor:
        """The boxes' content (B, C, h, w) of pictures (B, C, SIZE, SIZE)."""
        return pictures[self._index()].permute(0, 3, 1, 2).contiguous()

    def points(self, grid: Tensor) -> Tensor:
        """The boxes' part (B, h, w, 2) of a grid (B, SIZE, SIZE, 2)."""
        return self.cut(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def put(self, pictures: Tensor, content: Tensor) -> Tensor:
        """Pictures (B, C, SIZE, SIZE) with other content (B, C, h, w) in the boxes."""
        changed = pictures.clone()
        changed[self._index()] = content.permute(0, 2, 3, 1)
        return changed

    def _index(self) -> tuple[Tensor, slice, Tensor, Tensor]:
        batch = torch.arange(len(self.rows), device=self.rows.device)
        return batch[:, None, None], slice(None), self.rows[:, :, None], self.columns[:, None, :]


def mouth_box(alignment: AlignmentConfig, pose: Tensor) -> MouthBox:
    """The boxes of heads moved by poses (B, 6): of one size, inside the picture."""
    d = 2 * alignment.eye_distance  # of the crop's half side, as mouth_ellipse has it
    middle = pose.new_tensor([0.0, 2 * alignment.eye_y - 1 + 1.28 * d])
    # Whole patches of 4 px
    width, height = (4 * round(_MARGIN * radius * d * SIZE / 4) for radius in (0.72, 0.60))
    sides = torch.tensor([min(width, SIZE), min(height, SIZE)], device=pose.device)
    corner = ((done(pose, middle) + 1) * SIZE / 2 - sides / 2).round().long()
    x, y = torch.minimum(corner.clamp(min=0), SIZE - sides).unbind(-1)  # (B,) each
    columns = x[:, None] + torch.arange(int(sides[0]), device=pose.device)
    rows = y[:, None] + torch.arange(int(sides[1]), device=pose.device)
    points = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), -1)  # (B, h, w, 2)
    ellipse = mouth_ellipse(alignment, undone(pose[:, None, None], (2 * points + 1) / SIZE - 1))
    return MouthBox(rows, columns, (ellipse * _border(ellipse))[:, None])


def _border(boxes: Tensor) -> Tensor:
    """(h, w) for boxes (B, h, w): 1 inside, falling to 0 at the border."""
    falls = [
        (torch.minimum(at, at.flip(0)) / _FADE_PX).clamp(max=1)
        for at in (torch.arange(side, device=boxes.device) for side in boxes.shape[1:])
    ]
    return falls[0][:, None] * falls[1]


def redrawn(network: MouthNetwork, frame: Tensor, moved: Tensor, mask: Tensor) -> Tensor:
    """Boxes (B, 3, h, w) of the enlarged frame with the mouth as the network draws it; see MouthNetwork.forward."""
    parameter = next(network.parameters())
    given = (value.to(parameter, memory_format=torch.channels_last) for value in (frame, moved, mask))
    added, logits = (value.to(frame) for value in network(*given))
    # out = x + m (s (warp(x_Id) - x) + r)
    return frame + mask * (torch.sigmoid(logits) * (moved - frame) + added)
