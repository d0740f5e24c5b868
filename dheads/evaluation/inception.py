"""Inception-v3, the network of the FID.

Why it is defined here: torch-fidelity resizes as TensorFlow 1 does and scales pixels by (x - 128) / 128, so its
features are not those of pytorch-fid, which `dheads eval` reproduces; and pytorch-fid itself needs torchvision.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kernel = tuple[int, int]
Layer = tuple[int, list[Kernel]]  # channels, and the kernels of convolutions of the same input

_K1, _K3, _K5 = [(1, 1)], [(3, 3)], [(5, 5)]
_ROW, _COLUMN, _CROSS = [(1, 7)], [(7, 1)], [(1, 3), (3, 1)]
# As in TensorFlow's network, the average leaves out the padding, and the last block has a maximum instead.
_AVERAGE = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_MAXIMUM = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_DOWNSAMPLE = partial(F.max_pool2d, kernel_size=3, stride=2)


class Inception(nn.Module):
    """Inception-v3 (Szegedy et al., 2016) up to its pooled features, with torchvision's parameter names.

    Pictures (B, 3, 299, 299) in [-1, 1] -> (B, 2048).
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _conv(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = _conv(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = _conv(32, 64, (3, 3), padding=(1, 1))
        self.pool_1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = _conv(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = _conv(80, 192, (3, 3))
        self.pool_2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = _Mixed(192, _blocks_5(32))
        self.Mixed_5c = _Mixed(256, _blocks_5(64))
        self.Mixed_5d = _Mixed(288, _blocks_5(64))
        self.Mixed_6a = _Mixed(288, _BLOCK_6A, _DOWNSAMPLE)
        self.Mixed_6b = _Mixed(768, _blocks_6(128))
        self.Mixed_6c = _Mixed(768, _blocks_6(160))
        self.Mixed_6d = _Mixed(768, _blocks_6(160))
        self.Mixed_6e = _Mixed(768, _blocks_6(192))
        self.Mixed_7a = _Mixed(768, _BLOCK_7A, _DOWNSAMPLE)
        self.Mixed_7b = _Mixed(1280, _BLOCKS_7)
        self.Mixed_7c = _Mixed(2048, _BLOCKS_7, _MAXIMUM)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x.mean(dim=(2, 3))


class _Mixed(nn.Module):
    """Parallel branches whose outputs are concatenated; the last branch starts with the pooling."""

    def __init__(
        self, channels: int, branches: Mapping[str, list[Layer]], pool: Callable[..., Tensor] = _AVERAGE
    ) -> None:
        super().__init__()
        self._pool = pool
        self._branches: list[list[list[str]]] = []  # names of the convolutions by branch and layer
        for branch, layers in branches.items():
            width, names = channels, []
            for number, (out, kernels) in enumerate(layers, start=1):
                stem = f"{branch}_{number}" if len(layers) > 1 else branch
                names.append([stem] if len(kernels) == 1 else [f"{stem}{letter}" for letter in "ab"])
                downsamples = pool is _DOWNSAMPLE and number == len(layers)
                for name, (kernel_height, kernel_width) in zip(names[-1], kernels, strict=True):
                    padding = (0, 0) if downsamples else (kernel_height // 2, kernel_width // 2)
                    stride = 2 if downsamples else 1
                    self.add_module(name, _conv(width, out, (kernel_height, kernel_width), stride, padding))
                width = out * len(kernels)
            self._branches.append(names)

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x] * (len(self._branches) - 1) + [self._pool(x)]
        return torch.cat([self._run(y, branch) for y, branch in zip(inputs, self._branches, strict=True)], dim=1)

    def _run(self, x: Tensor, branch: list[list[str]]) -> Tensor:
        for names in branch:
            x = torch.cat([self.get_submodule(name)(x) for name in names], dim=1)
        return x


def _conv(channels: int, out: int, kernel: Kernel, stride: int = 1, padding: Kernel = (0, 0)) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(out, eps=0.001), relu=nn.ReLU(inplace=True)))


def _blocks_5(pooled: int) -> dict[str, list[Layer]]:
    return {
        "branch1x1": [(64, _K1)],
        "branch5x5": [(48, _K1), (64, _K5)],
        "branch3x3dbl": [(64, _K1), (96, _K3), (96, _K3)],
        "branch_pool": [(pooled, _K1)],
    }


def _blocks_6(width: int) -> dict[str, list[Layer]]:
    return {
        "branch1x1": [(192, _K1)],
        "branch7x7": [(width, _K1), (width, _ROW), (192, _COLUMN)],
        "branch7x7dbl": [(width, _K1), (width, _COLUMN), (width, _ROW), (width, _COLUMN), (192, _ROW)],
        "branch_pool": [(192, _K1)],
    }


_BLOCK_6A: dict[str, list[Layer]] = {
    "branch3x3": [(384, _K3)],
    "branch3x3dbl": [(64, _K1), (96, _K3), (96, _K3)],
    "branch_pool": [],
}
_BLOCK_7A: dict[str, list[Layer]] = {
    "branch3x3": [(192, _K1), (320, _K3)],
    "branch7x7x3": [(192, _K1), (192, _ROW), (192, _COLUMN), (192, _K3)],
    "branch_pool": [],
}
_BLOCKS_7: dict[str, list[Layer]] = {
    "branch1x1": [(320, _K1)],
    "branch3x3": [(384, _K1), (384, _CROSS)],
    "branch3x3dbl": [(448, _K1), (384, _K3), (384, _CROSS)],
    "branch_pool": [(192, _K1)],
}
