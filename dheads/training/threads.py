"""How a network is laid out for the device that trains it, and how many threads its operations take on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def suit(network: nn.Module, device: torch.device, compiled: bool) -> None:
    """Change the network, in place, to what is fastest to train on its device. compiled: whether it will be."""
    if device.type != "cpu":
        # On a CPU, the gradient of a group norm in bfloat16 takes up to 40 times as long in this layout.
        network.to(memory_format=torch.channels_last)
    elif not compiled:
        share_cores(network)


def share_cores(network: nn.Module) -> None:
    """Compute the gradients of the network's convolutions on half of the threads that PyTorch uses now.

    oneDNN's threads wait for each other at a weight's gradient in a loop that never sleeps, whatever OpenMP is set to.
    With as many threads as cores, and another program on one of them, the other threads wait for whole time slices: two
    runs at once took over three times as long as one. On half of the cores, two find room.
    """
    all_threads = torch.get_num_threads()
    half = max(1, all_threads // 2)

    def limit(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.grad_fn is not None:
            output.grad_fn.register_prehook(_setter(half))
            output.grad_fn.register_hook(_setter(all_threads))

    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            module.register_forward_hook(limit)


def _setter(threads: int) -> Callable[..., None]:
    """A hook of a backward node, which leaves its gradients as they are."""

    def set_threads(*gradients: object) -> None:
        torch.set_num_threads(threads)

    return set_threads
