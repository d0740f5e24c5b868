"""SyncNet: how well lips and sound agree, and the offset between them.

J. S. Chung and A. Zisserman, "Out of time: automated lip sync in the wild", ACCV workshops 2016. Two networks embed
0.2 s of sound and five frames of a face so that matching ones are close. The weights are the released
`syncnet_v2.model`; network, windows and search are those of the code released with it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dheads.config import FPS, SAMPLE_RATE
from dheads.errors import DheadsError
from dheads.evaluation.mfcc import mfcc
from dheads.weights.fetching import fetch

_FRAMES = 5  # in a window of pictures
_MFCC_PER_FRAME = 4
_SILENCE = 20  # range of the waveform, of 65536, below which it counts as silent


@dataclass(frozen=True)
class Sync:
    """How well picture and sound agree."""

    offset: int
    """Frames by which the picture is late: the sound of frame i belongs to picture i + offset. Sign as in the released
    code."""
    confidence: float
    """Median minus minimum of the distances over all shifts (LSE-C); higher is better."""
    distance: float
    """Minimum of the distances over all shifts, in the unit of the embeddings (LSE-D); lower is better."""


# ---- Network ----


class SyncNet(nn.Module):
    """Two networks that embed into one space (Chung and Zisserman 2016, section 2), with the released file's names."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_conv2d(1, 64, 3, padding=1),
            nn.Identity(),
            *_conv2d(64, 192, 3, padding=1),
            nn.MaxPool2d(3, (1, 2)),
            *_conv2d(192, 384, 3, padding=1),
            *_conv2d(384, 256, 3, padding=1),
            *_conv2d(256, 256, 3, padding=1),
            nn.MaxPool2d(3, 2),
            *_conv2d(256, 512, (5, 4)),
        )
        self.netfcaud = _head()
        self.netfclip = _head()
        self.netcnnlip = nn.Sequential(
            *_conv3d(3, 96, (5, 7, 7), stride=(1, 2, 2)),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_conv3d(96, 256, (1, 5, 5), stride=(1, 2, 2), padding=(0, 1, 1)),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), padding=(0, 1, 1)),
            *_conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1)),
            *_conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1)),
            *_conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1)),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_conv3d(256, 512, (1, 6, 6)),
        )

    def embed_sound(self, mfcc: Tensor) -> Tensor:
        """MFCC windows (N, 1, 13, 20) -> (N, 1024)."""
        embedding: Tensor = self.netfcaud(self.netcnnaud(mfcc).flatten(1))
        return embedding

    def embed_picture(self, pictures: Tensor) -> Tensor:
        """Windows of five BGR pictures (N, 3, 5, 224, 224) from 0 to 255 -> (N, 1024)."""
        embedding: Tensor = self.netfclip(self.netcnnlip(pictures).flatten(1))
        return embedding


def _conv2d(inputs: int, outputs: int, kernel: int | tuple[int, int], padding: int = 0) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, kernel, padding=padding), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def _conv3d(
    inputs: int,
    outputs: int,
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (0, 0, 0),
) -> tuple[nn.Module, ...]:
    return nn.Conv3d(inputs, outputs, kernel, stride, padding), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)


def _head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, 1024))


def load_syncnet(device: torch.device | str, progress: bool = True) -> SyncNet:
    """The released network in eval mode, downloaded into the cache folder on first use (weights.toml: `syncnet`).

    Raises DheadsError if the download fails, and for a file whose tensors do not match the network.
    """
    path = fetch("syncnet", progress)
    state = _read_state(path)
    with torch.device("meta"):
        net = SyncNet()
    try:
        # Without the file's metadata, batch norms accept the files of old torch, which lack num_batches_tracked.
        net.load_state_dict(state, assign=True)
    except RuntimeError as error:
        tensors = " ".join(str(error).splitlines()[1:2])  # the line that names the first mismatch
        reason = f"is not the released SyncNet: {shorten(tensors, 150)}"
        raise DheadsError(f"{path}, as weights.toml lists it, {reason}") from error
    return net.float().eval().requires_grad_(False).to(device)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # What torch raises for files that are cut off or of another kind.
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError):
        state = None  # torch's own message would advise an unsafe load
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) and isinstance(n, str) for n, x in state.items()):
        raise DheadsError(f"{path}, as weights.toml lists it, is not the released SyncNet: it holds no named tensors")
    return dict(state)


# ---- Search ----


@torch.inference_mode()
def sync(net: SyncNet, crops: Iterable[np.ndarray], waveform: np.ndarray, reach: int = 15, batch: int = 20) -> Sync:
    """How well the pictures of a face agree with the sound that starts with them.

    crops: F of (224, 224, 3) uint8 RGB at 25 fps from `face_crops`, read once, `batch` at a time. waveform: (N,) at
    16 kHz in int16 units. The longer of the two is cut to the length of the other. Shifts of up to `reach` frames
    either way are tried. Only the embeddings of a frame (8 kB) are kept.
    Raises DheadsError for fewer than six frames, a waveform shorter than six frames, and silence.
    """
    frames = len(waveform) // (SAMPLE_RATE // FPS)
    if frames and float(waveform.max()) - float(waveform.min()) < _SILENCE:
        raise DheadsError(
            "its sound is silent, so SyncNet cannot say whether lips and sound agree; give one with speech"
        )
    device = next(net.parameters()).device
    pictures = [net.embed_picture(x.to(device).float()) for x in _picture_windows(islice(crops, frames), batch)]
    if not pictures:
        raise DheadsError(f"SyncNet needs at least {_FRAMES + 1} frames and their sound; give a longer clip")
    embedded = torch.cat(pictures)
    sounds = torch.split(_sound_windows(waveform)[: len(embedded)], batch)
    return offset_of(torch.cat([net.embed_sound(x.to(device)) for x in sounds]), embedded, reach)


def offset_of(sound_embeddings: Tensor, picture_embeddings: Tensor, reach: int = 15) -> Sync:
    """The shift, up to `reach` frames either way, at which embeddings (W, D) of W windows, one per frame, are closest.

    As in the released code, the embeddings of the sound are padded with zeros, which count in the mean distances.
    """
    count = len(picture_embeddings)
    padded = F.pad(sound_embeddings, (0, 0, reach, reach))  # (W + 2 reach, D)
    # d_k = mean_i |picture_i - sound_(i + k - reach)|
    distances = torch.stack(
        [F.pairwise_distance(picture_embeddings, padded[k : k + count]).mean() for k in range(2 * reach + 1)]
    )
    best = int(distances.argmin())
    smallest = distances[best]
    return Sync(reach - best, float(distances.median() - smallest), float(smallest))


def _picture_windows(crops: Iterable[np.ndarray], batch: int) -> Iterator[Tensor]:
    """The five frames from each frame on, (B, 3, 5, 224, 224) uint8 BGR with B <= `batch`.

    The released code leaves out the last full window, so there are F - 5. It reads pictures with cv2.imread, so the
    network expects blue as the first channel and bytes from 0 to 255.
    """
    held: list[np.ndarray] = []
    for crop in crops:
        held.append(crop)
        if len(held) == batch + _FRAMES:
            yield _windows_of(held[:-1])
            held = held[batch:]
    if len(held) > _FRAMES:
        yield _windows_of(held[:-1])


def _windows_of(crops: list[np.ndarray]) -> Tensor:
    bgr = torch.from_numpy(np.stack(crops)[..., ::-1].copy())  # (F, H, W, 3)
    return bgr.unfold(0, _FRAMES, 1).permute(0, 3, 4, 1, 2)  # (F - 4, 3, 5, H, W)


def _sound_windows(waveform: np.ndarray) -> Tensor:
    """MFCC (W, 1, 13, 20) of the 0.2 s from the start of each frame."""
    columns = torch.from_numpy(mfcc(waveform)).float().T  # (13, T)
    windows = columns.unfold(1, _FRAMES * _MFCC_PER_FRAME, _MFCC_PER_FRAME)  # (13, W, 20)
    return windows.transpose(0, 1).unsqueeze(1)
