"""Features of frames and of short clips by trained networks, for the FID and the FVD.

FID: the 2048 pooled features of Inception-v3 for every frame, as pytorch-fid computes them.
FVD: the 400 outputs of I3D for clips of 16 frames, as StyleGAN-V computes them (Unterthiner et al., 2018).
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dheads.evaluation.inception import Inception
from dheads.media.pixels import to_unit
from dheads.weights.fetching import fetch
from dheads.weights.torchscript import load_script

INCEPTION_DIM, I3D_DIM = 2048, 400
CLIP_FRAMES = 16  # frames in a clip of the FVD; clips do not overlap
_BATCH = 16  # frames in a batch of Inception


class InceptionFeatures:
    """The pooled features of Inception-v3, in the version that defines FID."""

    def __init__(self, network: nn.Module, device: torch.device | str) -> None:
        self._network = network.to(device).eval()
        self._device = device

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Frames (N, H, W, 3) uint8 -> (N, 2048) float32. Frames are resized to 299 px, bilinear, no antialiasing."""
        features = [np.zeros((0, INCEPTION_DIM), np.float32)]
        with _exact():
            for start in range(0, len(frames), _BATCH):
                x = to_unit(torch.as_tensor(frames[start : start + _BATCH]).to(self._device))  # (B, 3, H, W)
                features.append(self._network(_resized(x, 299)).cpu().numpy())
        return np.concatenate(features)


def load_inception(device: torch.device | str = "cpu", progress: bool = True) -> InceptionFeatures:
    """The network of the FID, downloaded on first use. Raises DheadsError if that fails."""
    state = torch.load(fetch("fid-inception", progress), map_location="cpu", weights_only=True)
    network = Inception()
    network.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("fc.")})
    return InceptionFeatures(network, device)


class VideoFeatures:
    """The outputs of I3D (Carreira and Zisserman, 2017; trained on Kinetics-400) before the softmax."""

    def __init__(self, script: torch.jit.ScriptModule, device: torch.device | str) -> None:
        self._script = script
        self._device = device

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Frames (F, H, W, 3) uint8 at 25 fps -> (F // 16, 400) float32, one row per clip of 16 consecutive frames.

        Remaining frames at the end are left out. Frames are resized to 224 px, bilinear, no antialiasing.
        """
        features = [np.zeros((0, I3D_DIM), np.float32)]
        with _exact():
            for start in range(0, len(frames) - CLIP_FRAMES + 1, CLIP_FRAMES):
                clip = to_unit(torch.as_tensor(frames[start : start + CLIP_FRAMES]).to(self._device))
                video = _resized(clip, 224).transpose(0, 1)[None]  # (1, 3, 16, 224, 224)
                row = self._script(video, rescale=False, resize=False, return_features=True)
                features.append(row.cpu().numpy())
        return np.concatenate(features)


def load_i3d(device: torch.device | str = "cpu", progress: bool = True) -> VideoFeatures:
    """The network of the FVD, downloaded on first use. Raises DheadsError if that fails."""
    return VideoFeatures(load_script(fetch("fvd-i3d", progress), device), device)


def _resized(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


def _exact() -> AbstractContextManager[None]:
    """Makes CUDA compute convolutions in full float32 and deterministically."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
