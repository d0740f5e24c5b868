"""How far eyes are in a blink, by their code."""

from __future__ import annotations

import pytest
import torch

from dheads.extensions.eyes import blinking


def test_open_eyes_do_not_blink_and_shut_ones_do() -> None:
    code = torch.tensor([0.5, 0.0, -0.05, -0.25, -0.45, -1.4])
    assert blinking(code).tolist() == pytest.approx([0, 0, 0, 0.5, 1, 1])
