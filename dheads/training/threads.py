"""How many cores the operations of training take, so that a second program on the machine is not starved."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


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
