"""The loss of JPEG compression, compared with a real codec."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dheads.training.jpeg import through_jpeg


def through_codec(picture: np.ndarray, quality: int) -> np.ndarray:
    coded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1]


def tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float()


@pytest.mark.parametrize("size", [128, 72])
def test_a_face_changes_as_by_a_codec(examples: Path, size: int) -> None:
    """Within the rounding of libjpeg, which is far less than the loss of the compression itself."""
    face = cv2.resize(cv2.imread(str(examples / "face.jpg")), (size, size), interpolation=cv2.INTER_AREA)[..., ::-1]
    qualities = [40, 60, 75, 95]
    ours = through_jpeg(tensor(face).expand(4, 1, -1, -1, -1), torch.tensor(qualities))
    for shown, quality in zip(ours[:, 0], qualities, strict=True):
        codec = tensor(through_codec(face, quality))
        loss = (codec - tensor(face)).abs().mean()
        assert (shown - codec).abs().mean() < min(1.5, 0.45 * loss)
        assert (shown - tensor(face)).abs().mean() == pytest.approx(float(loss), rel=0.1)


def test_a_flat_picture_stays_as_it_is() -> None:
    flat = torch.tensor([30.0, 120.0, 200.0])[:, None, None].expand(1, 2, 3, 20, 24)
    torch.testing.assert_close(through_jpeg(flat, torch.tensor([90])), flat, rtol=0, atol=2)


def test_one_coefficient_is_rounded_to_its_step() -> None:
    """A block becomes flat if its only coefficient is less than half a step of the table."""
    wave = torch.cos((2 * torch.arange(8) + 1) * 7 * np.pi / 16)
    for amplitude, remains in ((5.0, False), (15.0, True)):  # 5.66 times that, of a step of 61
        block = (128 + amplitude * wave).expand(1, 1, 3, 16, 8).repeat(1, 1, 1, 1, 2)
        shown = through_jpeg(block, torch.tensor([50]))
        assert bool((shown - shown.mean()).abs().max() > 5) is remains
