"""Frechet distances of two sets of pictures (FID) and of videos (FVD) through features of two trained networks.

FID: Inception-v3's 2048 pooled features of every frame, as pytorch-fid takes them (Heusel et al., 2017, eq. 6).
FVD: I3D's 400 outputs, before the softmax, of clips of 16 frames, as StyleGAN-V takes them (Unterthiner et al., 2018).
Both distances fall with the number of samples, so compare only what was computed from as many.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dheads.errors import DheadsError
from dheads.media.video import to_unit
from dheads.weights.fetching import fetch
from dheads.weights.torchscript import load_script

INCEPTION_DIM, I3D_DIM = 2048, 400
CLIP_FRAMES = 16  # frames in a clip of the FVD, and from one clip's start to the next
_BATCH = 16  # frames that go through Inception at a time
_CUSTOMARY = {INCEPTION_DIM: 10_000, I3D_DIM: 2_048}  # samples that the two papers or their followers ask for


# ---- Distance ----


class Gaussian:
    """Mean and covariance in float64 of features that come in parts; its memory does not grow with their number."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(1)  # (D,)
        self._scatter = np.zeros((1, 1))  # (D, D), sum of (x - mean) (x - mean)^T

    @property
    def cov(self) -> np.ndarray:
        """The unbiased covariance (D, D); NaN for fewer than two samples."""
        return self._scatter / (self.count - 1 if self.count > 1 else np.nan)

    def add(self, features: np.ndarray) -> None:
        """Take in features (N, D)."""
        part = Gaussian()
        part.count = len(features)
        if part.count:
            part.mean = features.mean(axis=0, dtype=np.float64)
            centred = features - part.mean
            part._scatter = centred.T @ centred
        self.merge(part)

    def merge(self, other: Gaussian) -> None:
        """Take in all that another one has seen."""
        count = self.count + other.count
        if not other.count:
            return
        # S = S_a + S_b + n_a n_b / n (m_b - m_a) (m_b - m_a)^T
        delta = other.mean - self.mean
        self._scatter = self._scatter + other._scatter + np.outer(delta, delta) * (self.count * other.count / count)
        self.mean = self.mean + delta * (other.count / count)
        self.count = count


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet distance of two Gaussians, which is what FID and FVD are.

    Raises DheadsError where one of them has seen fewer than two samples.
    """
    if min(a.count, b.count) < 2:
        raise DheadsError(
            f"a Frechet distance needs two samples or more a side, but there are {a.count} and {b.count}; "
            "give more or longer videos"
        )
    # d^2 = |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a^1/2 C_b C_a^1/2)^1/2
    # With C = R R^T the last trace is the sum of the singular values of R_a^T R_b: real, and no square root of noise.
    shared = np.linalg.svd(_root(a.cov).T @ _root(b.cov), compute_uv=False).sum()
    shift = a.mean - b.mean
    return max(0.0, float(shift @ shift + np.trace(a.cov) + np.trace(b.cov) - 2 * shared))


def _root(cov: np.ndarray) -> np.ndarray:
    """R (D, rank) with R R^T = cov (D, D)."""
    values, vectors = np.linalg.eigh(cov)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def too_few(count: int, dim: int) -> str | None:
    """What a reader must know of a distance from `count` samples of `dim` features; None where there are enough."""
    if count <= dim:
        return f"{count} samples cannot span {dim} features, so the distance is far too large and hardly comparable"
    if count < _CUSTOMARY.get(dim, 0):
        return f"{count} samples are fewer than the customary {_CUSTOMARY[dim]}, so the distance is somewhat too large"
    return None


# ---- Features of pictures ----


class InceptionFeatures:
    """The last pooled features of Inception-v3 in the version that FID is defined with."""

    def __init__(self, network: nn.Module, device: torch.device | str) -> None:
        self._network = network.to(device).eval()
        self._device = device

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Frames (N, H, W, 3) uint8 -> (N, 2048) float32; each is resized to 299 px, bilinearly, without smoothing."""
        parts = [np.zeros((0, INCEPTION_DIM), np.float32)]
        with _exact():
            for start in range(0, len(frames), _BATCH):
                x = to_unit(torch.as_tensor(frames[start : start + _BATCH]).to(self._device))  # (B, 3, H, W)
                parts.append(self._network(_resized(x, 299)).cpu().numpy())
        return np.concatenate(parts)


def load_inception(device: torch.device | str = "cpu", progress: bool = True) -> InceptionFeatures:
    """The network of the FID, downloaded at the first call. Raises DheadsError, which says where the file belongs."""
    state = torch.load(fetch("fid-inception", progress), map_location="cpu", weights_only=True)
    network = Inception()
    network.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("fc.")})
    return InceptionFeatures(network, device)


Kernel = tuple[int, int]
Step = tuple[int, list[Kernel]]  # channels, and the kernels of units that stand side by side

_K1, _K3, _K5 = [(1, 1)], [(3, 3)], [(5, 5)]
_ROW, _COLUMN, _CROSS = [(1, 7)], [(7, 1)], [(1, 3), (3, 1)]
# TensorFlow's average leaves the padding out; and its last block takes the largest where others take the average.
_AVERAGE = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_LARGEST = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_HALVED = partial(F.max_pool2d, kernel_size=3, stride=2)


class Inception(nn.Module):
    """Inception-v3 (Szegedy et al., 2016) up to its pooled features, by torchvision's names.

    Pictures (B, 3, 299, 299) in [-1, 1] -> (B, 2048).
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _unit(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = _unit(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = _unit(32, 64, (3, 3), padding=(1, 1))
        self.pool_1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = _unit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = _unit(80, 192, (3, 3))
        self.pool_2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = _Mixed(192, _square_paths(32))
        self.Mixed_5c = _Mixed(256, _square_paths(64))
        self.Mixed_5d = _Mixed(288, _square_paths(64))
        self.Mixed_6a = _Mixed(288, _FIRST_HALVING, _HALVED)
        self.Mixed_6b = _Mixed(768, _line_paths(128))
        self.Mixed_6c = _Mixed(768, _line_paths(160))
        self.Mixed_6d = _Mixed(768, _line_paths(160))
        self.Mixed_6e = _Mixed(768, _line_paths(192))
        self.Mixed_7a = _Mixed(768, _SECOND_HALVING, _HALVED)
        self.Mixed_7b = _Mixed(1280, _CROSS_PATHS)
        self.Mixed_7c = _Mixed(2048, _CROSS_PATHS, _LARGEST)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x.mean(dim=(2, 3))


class _Mixed(nn.Module):
    """Paths of units over one input, whose outputs are joined on channels; the last path begins with a pooling."""

    def __init__(self, channels: int, paths: Mapping[str, list[Step]], pool: Callable[..., Tensor] = _AVERAGE) -> None:
        super().__init__()
        self._pool = pool
        self._paths: list[list[list[str]]] = []  # the names of a path's steps' units
        for path, steps in paths.items():
            width, names = channels, []
            for number, (out, kernels) in enumerate(steps, start=1):
                stem = f"{path}_{number}" if len(steps) > 1 else path
                names.append([stem] if len(kernels) == 1 else [f"{stem}{letter}" for letter in "ab"])
                halves = pool is _HALVED and number == len(steps)
                for name, (height, across) in zip(names[-1], kernels, strict=True):
                    padding = (0, 0) if halves else (height // 2, across // 2)
                    self.add_module(name, _unit(width, out, (height, across), 2 if halves else 1, padding))
                width = out * len(kernels)
            self._paths.append(names)

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x] * (len(self._paths) - 1) + [self._pool(x)]
        return torch.cat([self._walk(y, path) for y, path in zip(inputs, self._paths, strict=True)], dim=1)

    def _walk(self, x: Tensor, path: list[list[str]]) -> Tensor:
        for names in path:
            x = torch.cat([self.get_submodule(name)(x) for name in names], dim=1)
        return x


def _unit(channels: int, out: int, kernel: Kernel, stride: int = 1, padding: Kernel = (0, 0)) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(out, eps=0.001), relu=nn.ReLU(inplace=True)))


def _square_paths(pooled: int) -> dict[str, list[Step]]:
    return {
        "branch1x1": [(64, _K1)],
        "branch5x5": [(48, _K1), (64, _K5)],
        "branch3x3dbl": [(64, _K1), (96, _K3), (96, _K3)],
        "branch_pool": [(pooled, _K1)],
    }


def _line_paths(width: int) -> dict[str, list[Step]]:
    return {
        "branch1x1": [(192, _K1)],
        "branch7x7": [(width, _K1), (width, _ROW), (192, _COLUMN)],
        "branch7x7dbl": [(width, _K1), (width, _COLUMN), (width, _ROW), (width, _COLUMN), (192, _ROW)],
        "branch_pool": [(192, _K1)],
    }


_FIRST_HALVING: dict[str, list[Step]] = {
    "branch3x3": [(384, _K3)],
    "branch3x3dbl": [(64, _K1), (96, _K3), (96, _K3)],
    "branch_pool": [],
}
_SECOND_HALVING: dict[str, list[Step]] = {
    "branch3x3": [(192, _K1), (320, _K3)],
    "branch7x7x3": [(192, _K1), (192, _ROW), (192, _COLUMN), (192, _K3)],
    "branch_pool": [],
}
_CROSS_PATHS: dict[str, list[Step]] = {
    "branch1x1": [(320, _K1)],
    "branch3x3": [(384, _K1), (384, _CROSS)],
    "branch3x3dbl": [(448, _K1), (384, _K3), (384, _CROSS)],
    "branch_pool": [(192, _K1)],
}


# ---- Features of clips ----


class VideoFeatures:
    """The outputs of I3D (Carreira and Zisserman, 2017; trained on Kinetics-400) before the softmax."""

    def __init__(self, script: torch.jit.ScriptModule, device: torch.device | str) -> None:
        self._script = script
        self._device = device

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Frames (F, H, W, 3) uint8 at 25 fps -> (F // 16, 400) float32, one row a clip.

        The clips of 16 frames in a row lie end to end from the first frame; the frames left over at the end are not
        seen. Each frame is resized to 224 x 224 px, bilinearly, without smoothing.
        """
        parts = [np.zeros((0, I3D_DIM), np.float32)]
        with _exact():
            for start in range(0, len(frames) - CLIP_FRAMES + 1, CLIP_FRAMES):
                clip = to_unit(torch.as_tensor(frames[start : start + CLIP_FRAMES]).to(self._device))
                video = _resized(clip, 224).transpose(0, 1)[None]  # (1, 3, 16, 224, 224)
                features = self._script(video, rescale=False, resize=False, return_features=True)
                parts.append(features.cpu().numpy())
        return np.concatenate(parts)


def load_i3d(device: torch.device | str = "cpu", progress: bool = True) -> VideoFeatures:
    """The network of the FVD, downloaded at the first call. Raises DheadsError, which says where the file belongs."""
    return VideoFeatures(load_script(fetch("fvd-i3d", progress), device), device)


def _resized(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


def _exact() -> AbstractContextManager[None]:
    """Convolutions that a CUDA device computes in full float32, the same way each time."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
