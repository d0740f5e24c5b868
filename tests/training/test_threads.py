"""The threads of training's operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dheads.training.threads import share_cores, suit


class Threads(TorchDispatchMode):
    """Notes how many threads each operation may use."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.setdefault(func.overloadpacket.__name__, set()).add(torch.get_num_threads())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_gradients_of_convolutions_take_half_of_the_threads(four_threads: None) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 3))
    x = torch.randn(2, 3, 8, 8)
    network(x).square().mean().backward()
    expected = [parameter.grad for parameter in network.parameters()]
    network.zero_grad(set_to_none=True)

    share_cores(network)
    with Threads() as threads:
        network(x).square().mean().backward()
    assert threads.seen["convolution"] == threads.seen["silu"] == threads.seen["silu_backward"] == {4}
    assert threads.seen["convolution_backward"] == {2}
    assert torch.get_num_threads() == 4
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_without_gradients_nothing_changes(four_threads: None) -> None:
    network = nn.Conv1d(3, 2, 1)
    share_cores(network)
    with torch.no_grad():
        assert network(torch.ones(1, 3, 5)).grad_fn is None
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("device", "compiled", "last"), [("cpu", False, False), ("cpu", True, False), ("cuda", False, True)]
)
def test_the_layout_and_the_threads_suit_the_device(
    four_threads: None, device: str, compiled: bool, last: bool
) -> None:
    network = nn.Conv2d(3, 4, 3)
    suit(network, torch.device(device), compiled)
    assert network.weight.is_contiguous(memory_format=torch.channels_last) is last
    with Threads() as threads:
        network(torch.ones(1, 3, 5, 5)).sum().backward()
    assert threads.seen["convolution_backward"] == {2 if device == "cpu" and not compiled else 4}
