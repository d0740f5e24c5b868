"""Where nothing is said, and that the mouth rests there."""

from __future__ import annotations

import pytest
import torch

from dheads.pauses import hushed, pause_degree


@pytest.mark.parametrize(("change", "degree"), [(0.0, 1), (0.12, 1), (0.17, 0.5), (0.22, 0), (3.0, 0)])
def test_it_is_a_pause_where_the_codes_hardly_change(change: float, degree: float) -> None:
    codes = torch.zeros(13, 3)
    codes[1::2] = change  # there and back
    assert pause_degree(codes).item() == pytest.approx(degree, abs=1e-5)


def test_one_frame_is_not_a_pause() -> None:
    assert pause_degree(torch.ones(1, 3)).item() == 0


def test_the_sound_gives_way_to_its_mean() -> None:
    speech = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    assert torch.equal(hushed(speech, torch.tensor(0.0)), speech)
    assert torch.equal(hushed(speech, torch.tensor(0.5)), torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]))
    assert torch.equal(hushed(speech, torch.tensor(1.0)), torch.tensor([[2.0, 1.0]] * 3))
