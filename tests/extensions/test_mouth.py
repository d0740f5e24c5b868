"""The mouth network: where its box is, what it may change, and that it is shown in videos only."""

from __future__ import annotations

import pytest
import torch

from dheads.config import override, preset
from dheads.errors import DheadsError
from dheads.extensions.copying import mouth_mask
from dheads.extensions.mouth import SIZE, MouthNetwork, mouth_box, redrawn
from dheads.extensions.network import ExtendedUNet

ALIGNMENT = preset("small").alignment


def poses(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows)


def test_the_box_holds_the_mouth_mask_and_moves_with_the_head() -> None:
    pose = poses((0, 0, 0, 0, 0, 0), (0.08, 0.1, 0.1, -0.15, 0.2, 0.1))
    box = mouth_box(ALIGNMENT, pose)
    whole = box.put(torch.zeros(2, 1, SIZE, SIZE), box.mask)
    still = mouth_mask(ALIGNMENT, SIZE, torch.device("cpu"))
    torch.testing.assert_close(whole[:1], still, rtol=0, atol=0.02)
    # 0.1 and -0.15 of the half side: 12.8 px to the right, 19.2 up, and the mouth's place turned and enlarged
    middle = [torch.stack(torch.where(mask[0] > 0.5)).float().mean(1) for mask in whole]
    down, right = (middle[1] - middle[0]).tolist()
    assert right == pytest.approx(12.8 - 0.1 * 0.528 * 128 * 1.08, abs=1)
    assert down == pytest.approx(-19.2 + 0.083 * 0.528 * 128, abs=1)


def test_the_box_stays_inside_the_picture() -> None:
    box = mouth_box(ALIGNMENT, poses((0, 0, 0.9, 0.9, 0, 0), (0, 0, -0.9, -0.9, 0, 0)))
    for at in (box.rows, box.columns):
        assert at.min() >= 0
        assert at.max() < SIZE
        assert (at.diff(dim=1) == 1).all()


def test_cut_and_put_are_inverse() -> None:
    pictures = torch.rand((2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    box = mouth_box(ALIGNMENT, poses((0, 0, 0, 0, 0, 0), (0, 0, 0.1, -0.1, 0, 0)))
    cut = box.cut(pictures)
    assert torch.equal(cut[1], pictures[1][:, box.rows[1]][:, :, box.columns[1]])
    assert torch.equal(box.put(pictures, cut), pictures)
    assert torch.equal(box.cut(box.put(pictures, 1 - cut)), 1 - cut)


def test_a_new_network_changes_next_to_nothing() -> None:
    frame, moved = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    with torch.no_grad():
        shown = redrawn(MouthNetwork(12), frame, moved, torch.ones(1, 1, 64, 64))
    torch.testing.assert_close(shown, torch.full_like(frame, 0.018), rtol=0, atol=1e-4)  # sigmoid(-4)


def test_it_needs_a_photo_that_moves() -> None:
    with pytest.raises(DheadsError, match=r"extensions\.mouth\.channels needs extensions\.warp\.flow"):
        override(preset("tiny"), {"extensions": {"mouth": {"channels": 12}}})


def test_weights_without_it_can_begin_with_it() -> None:
    config = preset("small")
    few = {"network": {"model_channels": 32, "head_channels": 32}}
    without = ExtendedUNet(override(config, few, {"extensions": {"mouth": {"channels": 0}}}))
    having = ExtendedUNet(override(config, few, {"extensions": {"mouth": {"channels": 12}}}))
    assert having.mouth is not None
    fresh = having.mouth.out.bias.clone()
    having.start_from(without.state_dict())
    assert torch.equal(having.mouth.out.bias, fresh)
    assert torch.equal(having.stem.weight, without.stem.weight)
    assert not any(parameter.requires_grad for parameter in having.mouth.parameters()), "trained apart from the rest"
