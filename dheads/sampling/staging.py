"""How a photo is given to the network, and how frames of the video are made of what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np

from dheads.config import Config
from dheads.faces.alignment import apply_transform, framed, scaled_transform
from dheads.faces.composition import Outline, PastedComposition, crop_composition
from dheads.faces.paste import Paster
from dheads.sampling.layers import layer_size
from dheads.sampling.portrait import Portrait


@dataclass(frozen=True, eq=False)
class Stage:
    """A photo, and what is made of its frames."""

    photo: np.ndarray  # (H, W, 3) uint8, as the network sees it
    middle: np.ndarray | None  # (S, S, 3) uint8, at the size of layers, where frames come as layers
    finish: Callable[[np.ndarray], np.ndarray]  # a frame or layers -> the frame of the video
    shape: tuple[int, int]  # height and width of the video's frames, px


def staged(config: Config, portrait: Portrait, side: int | None, paste: bool = False) -> Stage:
    """side: of the video, px; None: that of the network's frames. paste: frames show the whole picture, with a side of
    at most `side` px; None: as large as most players decode.
    """
    picture, matrix, size = portrait.picture, portrait.matrix, config.network.image_size
    photo, moves = framed(picture, matrix, size), config.extensions.warp.flow
    if moves and (paste or (side is not None and side > size)):
        layer = layer_size(config)
        to_layers = scaled_transform(matrix, layer / size)
        middle = framed(picture, to_layers, layer)
        outlined = Outline(apply_transform(to_layers, portrait.landmarks), config.alignment, layer)
        if paste:
            pasted = PastedComposition(picture, matrix, size, config.alignment, side)
            return Stage(photo, middle, lambda layers: pasted(outlined(layers)), pasted.shape)
        assert side is not None
        compose = crop_composition(picture, matrix, size, max(side, layer))
        return Stage(photo, middle, lambda layers: resized_frame(compose(outlined(layers)), side), (side, side))
    if paste:
        paster = Paster(picture, matrix, size, config.alignment, side)
        return Stage(photo, None, paster, paster.shape)
    return Stage(photo, None, partial(resized_frame, size=side), (side or size, side or size))


def resized_frame(frame: np.ndarray, size: int | None) -> np.ndarray:
    """A square frame at `size` px; None keeps it."""
    if size is None or size == len(frame):
        return frame
    return cv2.resize(frame, (size, size), interpolation=cv2.INTER_LANCZOS4)
