"""Pixels between uint8 and [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch

from dheads.media.pixels import to_uint8, to_unit


def test_all_pixel_values_make_the_round_trip():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    unit = to_unit(frames)
    assert (unit.shape, unit.dtype) == ((1, 3, 16, 16), torch.float32)
    assert (unit.min(), unit.max()) == (-1, 1)
    assert np.array_equal(to_uint8(unit).numpy(), frames)
    assert torch.equal(to_unit(torch.from_numpy(frames)), unit)


def test_axes_rounding_and_clamping():
    frame = np.zeros((4, 6, 3), np.uint8)
    frame[1, 2, 0] = 255
    assert to_unit(frame)[0, 1, 2] == 1
    x = torch.tensor([-7.0, 7.0, 0.0, 1 / 127.5 * 0.4]).expand(2, 3, 1, 4)
    assert to_uint8(x).shape == (2, 1, 4, 3)
    assert to_uint8(x)[1, 0, :, 2].tolist() == [0, 255, 128, 128]
    assert to_uint8(x.bfloat16()).dtype == torch.uint8
