"""What a frame consists of, for videos larger than the network's frames: what was drawn, and what the photo gives.

A frame of the network is cut into layers at 256 px, where the mouth is drawn anew; `faces/composition.py` composes the
frame of the video from them and from the photo's own pixels, at any size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dheads.config import AlignmentConfig, Config
from dheads.extensions.copying import pixel_grid
from dheads.extensions.mouth import SIZE, MouthNetwork, mouth_box, redrawn
from dheads.extensions.warp import Taken, enlarged_grid, resized, sampled

# Where the network's share is less than this, the photo gets it: of so little, what remains without the photo
# is mostly what the solver adds, which changes from frame to frame, and makes hair flicker.
_NEGLIGIBLE = 0.05


def layer_size(config: Config) -> int:
    """Of a side of the layers, px."""
    return max(SIZE, config.network.image_size)


def layers(
    x_0: Tensor,
    taken: Taken,
    photo: Tensor,
    middle: Tensor,
    mouth: MouthNetwork | None,
    alignment: AlignmentConfig,
    pose: Tensor,
) -> Tensor:
    """Frames (B, 3, H, W) as layers (B, S, S, 7), as faces/composition.py has them.

    photo (B, 3, H, W): as the network sees it; middle (B, 3, S, S): the same photo; pose (B, 6): of the head.
    """
    size = middle.shape[-1]
    own, in_place, moved = taken.share.split(1, dim=1)
    # g_0 x_0' = x_0 - g_1 x_Id - g_2 warp(x_Id), in levels of 255: 127.5 (x + 1)
    drawn = x_0 - in_place * photo - moved * sampled(photo, taken.grid) + own
    kept = (own / _NEGLIGIBLE).clamp(max=1)
    drawn, shares = resized(127.5 * kept * drawn, size), resized(torch.cat([kept * own, in_place], 1), size, "bilinear")
    grid = enlarged_grid(taken.grid, size)
    if mouth is not None:
        box = mouth_box(alignment, pose)
        enlarged = box.cut(resized(x_0, size))
        change = redrawn(mouth, enlarged, sampled(middle, box.points(grid)), box.mask) - enlarged
        drawn = box.put(drawn, box.cut(drawn) + 127.5 * change)
    offset = (grid - pixel_grid(size, grid.device)).permute(0, 3, 1, 2)
    return torch.cat([drawn, shares, offset], 1).permute(0, 2, 3, 1)
