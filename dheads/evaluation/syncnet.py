"""SyncNet: whether lips and sound agree, and by how many frames they are apart.

J. S. Chung and A. Zisserman, "Out of time: automated lip sync in the wild", ACCV workshops 2016. Two networks embed
0.2 s of sound and five frames of a face so that what belongs together lies close. The weights are the released
`syncnet_v2.model`; network, windows and search are those of the code that was released with it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from textwrap import shorten

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dheads.config import FPS, SAMPLE_RATE
from dheads.errors import DheadsError
from dheads.faces.alignment import fill_gaps
from dheads.weights.fetching import fetch

SIZE = 224  # px, a crop's side
_FRAMES = 5  # a window of pictures
_COLUMNS_PER_FRAME = 4  # of MFCC
_SILENCE = 20  # the range of sound, of 65536, below which nothing can be heard


@dataclass(frozen=True)
class Sync:
    """How picture and sound fit.

    offset: frames by which the picture comes late: positive where the sound of frame i belongs to picture i + offset,
    negative where the sound comes after its picture. (The code released with SyncNet has this sign too.)
    confidence: the median less the smallest of the distances over all shifts (LSE-C); the higher, the better.
    distance: the smallest distance, in the embedding's own unit (LSE-D); the lower, the better.
    """

    offset: int
    confidence: float
    distance: float


# ---- Network ----


class SyncNet(nn.Module):
    """Two networks into one space (Chung and Zisserman 2016, section 2), with the released file's names."""

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
        return self.netfcaud(self.netcnnaud(mfcc).flatten(1))

    def embed_picture(self, pictures: Tensor) -> Tensor:
        """Windows of five pictures (N, 3, 5, 224, 224), B, G, R from 0 to 255 -> (N, 1024)."""
        return self.netfclip(self.netcnnlip(pictures).flatten(1))


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

    Raises DheadsError where it is neither there nor can be downloaded (saying which file to put where), and for a file
    whose tensors are not exactly this network's.
    """
    path = fetch("syncnet", progress)
    state = _read_state(path)
    with torch.device("meta"):
        net = SyncNet()
    try:
        # Without the metadata of newer files, batch norms do not miss the count of batches, which older ones lack.
        net.load_state_dict(state, assign=True)
    except RuntimeError as error:
        tensors = " ".join(str(error).splitlines()[1:2])  # the line that names the first at fault
        reason = f"is not the released SyncNet: {shorten(tensors, 150)}"
        raise DheadsError(f"{path}, as weights.toml lists it, {reason}") from error
    return net.float().eval().requires_grad_(False).to(device)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # What torch throws at files that are cut off or something else.
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError):
        state = None  # its message would advise to load the file unsafely
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) and isinstance(n, str) for n, x in state.items()):
        raise DheadsError(f"{path}, as weights.toml lists it, is not the released SyncNet: it holds no named tensors")
    return dict(state)


# ---- Sound ----

_WINDOW, _HOP, _FFT = 400, 160, 512  # samples: 25 ms, 10 ms
_FILTERS, _COEFFICIENTS, _LIFTER = 26, 13, 22
_PREEMPHASIS = 0.97
_EPS = np.finfo(float).eps  # instead of zero, before a logarithm
_COLUMNS_AT_ONCE = 3000  # half a minute


def mfcc(waveform: np.ndarray) -> np.ndarray:
    """Mel-frequency cepstral coefficients (T, 13) float64, a row every 10 ms, of 16 kHz sound (N,) in int16 units.

    T = 1 + ceil((N - 400) / 160); the last window is filled up with zeros. The first coefficient is the logarithm of
    the window's energy. Values are those of python_speech_features 0.6 with its defaults.
    """
    # y_n = x_n - 0.97 x_(n-1)
    sound = np.append(waveform[:1], waveform[1:] - _PREEMPHASIS * waveform[:-1].astype(np.float64))
    count = 1 + max(0, -(-(len(sound) - _WINDOW) // _HOP))
    sound = np.pad(sound, (0, max(0, (count - 1) * _HOP + _WINDOW - len(sound))))
    windows = np.lib.stride_tricks.sliding_window_view(sound, _WINDOW)[::_HOP][:count]  # (T, 400), a view
    return np.concatenate(
        [_cepstra(windows[begin : begin + _COLUMNS_AT_ONCE]) for begin in range(0, count, _COLUMNS_AT_ONCE)]
    )


def _cepstra(windows: np.ndarray) -> np.ndarray:
    """(T, 13) of windows (T, 400) of sound."""
    # P_k = |FFT(x)_k|^2 / 512
    power = np.abs(np.fft.rfft(windows, _FFT)) ** 2 / _FFT  # (T, 257)
    mel = _log(power @ _mel_filters().T)  # (T, 26)
    # c_i = (1 + 11 sin(pi i / 22)) DCT(mel)_i
    i = np.arange(_COEFFICIENTS)
    cepstra = (1 + _LIFTER / 2 * np.sin(np.pi * i / _LIFTER)) * (mel @ _dct().T)  # (T, 13)
    cepstra[:, 0] = _log(power.sum(axis=1))
    return cepstra


def _log(x: np.ndarray) -> np.ndarray:
    return np.log(np.where(x == 0, _EPS, x))


def _mel_filters() -> np.ndarray:
    """26 triangles (26, 257) over the bins of the spectrum, equally wide on the mel scale from 0 to 8000 Hz."""
    # mel = 2595 log10(1 + hz / 700)
    edges_mel = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), _FILTERS + 2)
    edges_hz = 700 * (10 ** (edges_mel / 2595) - 1)
    edges = np.floor((_FFT + 1) * edges_hz / SAMPLE_RATE)  # bins
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]  # (26, 1)
    bins = np.arange(_FFT // 2 + 1)
    return np.clip(np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)), 0, None)


def _dct() -> np.ndarray:
    """The first rows (13, 26) of the orthonormal DCT-II."""
    # D_ij = sqrt(2 / M) cos(pi i (2 j + 1) / 2 M), the row i = 0 divided by sqrt 2
    i, j = np.arange(_COEFFICIENTS)[:, None], np.arange(_FILTERS)
    rows = np.sqrt(2 / _FILTERS) * np.cos(np.pi * i * (2 * j + 1) / (2 * _FILTERS))
    rows[0] /= np.sqrt(2)
    return rows


# ---- Pictures ----

_FOREHEAD = 0.32
_CONTEXT = 0.4
_SMOOTH_FRAMES = 13
_GRAY = 110


def face_crops(frames: Iterable[np.ndarray], landmarks: np.ndarray) -> Iterator[np.ndarray]:
    """Crops (224, 224, 3) uint8 of frames (H, W, 3) uint8 at 25 fps, framed as the released code frames a face.

    landmarks: (F, 68, 2) px, of as many frames; a NaN row, where no face was seen, is filled in from its neighbours.
    With s half the larger side of the face's box, a running median over 13 frames, the crop goes from 1.4 s left to
    1.4 s right of the box's centre, and from s above to 1.8 s below it; beyond the picture's edge it is gray.
    Raises DheadsError where no frame has a face.
    """
    if not np.isfinite(landmarks).all(axis=(1, 2)).any():
        raise DheadsError("no frame shows a face, so SyncNet has nothing to look at; give a video with a face")
    boxes = _smoothed(_face_boxes(fill_gaps(landmarks.astype(np.float64), len(landmarks))))
    return (_crop(frame, *box) for frame, box in zip(frames, boxes, strict=True))


def _face_boxes(landmarks: np.ndarray) -> np.ndarray:
    """Centre and half the larger side, (F, 3) x y s px, of the box that the released code's detector would give.

    Landmarks (F, 68, 2) end at the brows, a detector's box at the hair. YuNet, trained on the same boxes (WIDER FACE),
    puts its upper edge 0.32 of the landmarks' height above them (0.24 to 0.41 in 150 pictures), and the
    other edges where the landmarks end.
    """
    low, high = landmarks.min(axis=1), landmarks.max(axis=1)  # (F, 2)
    low[:, 1] -= _FOREHEAD * (high - low)[:, 1]
    return np.column_stack([(low + high) / 2, (high - low).max(axis=1) / 2])


def _smoothed(boxes: np.ndarray) -> np.ndarray:
    """The running median of boxes (F, 3) over 13 frames, at the ends over those that there are."""
    # The released code puts zeros beyond the ends, which would pull the crops of short clips into a corner.
    margin = _SMOOTH_FRAMES // 2
    padded = np.pad(boxes, ((margin, margin), (0, 0)), constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, _SMOOTH_FRAMES, axis=0), axis=-1)


def _crop(frame: np.ndarray, x: float, y: float, s: float) -> np.ndarray:
    # Bilinear and without a blur before shrinking, as the network has seen pictures in training.
    scale = max((2 + 2 * _CONTEXT) * s, 1) / SIZE  # px of the frame a px of the crop
    left, top = x - (1 + _CONTEXT) * s, y - s
    matrix = np.array([(scale, 0, left + (scale - 1) / 2), (0, scale, top + (scale - 1) / 2)])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(frame, matrix, (SIZE, SIZE), flags=flags, borderValue=(_GRAY, _GRAY, _GRAY))


# ---- Both ----


@torch.inference_mode()
def sync(net: SyncNet, crops: Iterable[np.ndarray], waveform: np.ndarray, reach: int = 15, batch: int = 20) -> Sync:
    """How the pictures of a face fit the sound that begins with them.

    crops: (F, 224, 224, 3) uint8 RGB of `face_crops`, 25 a second, read once and `batch` at a time. waveform: (N,) at
    16 kHz in int16 units. What lasts longer, picture or sound, is cut off. Shifts of up to `reach` frames are tried.
    Of a frame only its embeddings are kept (8 kB).
    Raises DheadsError for less than six frames or as much sound, and for silence, of which nothing can be said.
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
    sounds = _sound_windows(waveform)[: len(embedded)].split(batch)
    return offset_of(torch.cat([net.embed_sound(x.to(device)) for x in sounds]), embedded, reach)


def offset_of(sound_embeddings: Tensor, picture_embeddings: Tensor, reach: int = 15) -> Sync:
    """The shift, up to `reach` frames either way, at which embeddings (W, D) lie closest; W windows, one a frame.

    Beyond its ends the sound's embedding is zero, which every shift's mean includes, as in the released code.
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
    """Five frames from each one on, (B, 3, 5, 224, 224) uint8 in the order B, G, R, up to `batch` at once.

    The released code leaves out the last full window, so W = F - 5. It reads pictures with cv2.imread, so the network
    knows blue as the first channel, and takes the bytes as they are, from 0 to 255.
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
    """MFCC (W, 1, 13, 20) of the 0.2 s from each frame's beginning on."""
    columns = torch.from_numpy(mfcc(waveform)).float().T  # (13, T)
    windows = columns.unfold(1, _FRAMES * _COLUMNS_PER_FRAME, _COLUMNS_PER_FRAME)  # (13, W, 20)
    return windows.transpose(0, 1).unsqueeze(1)
