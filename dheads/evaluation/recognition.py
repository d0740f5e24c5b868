"""Whether a generated face is still the same person: the cosine of face embeddings by OpenCV's SFace.

SFace (Zhong et al., 2021) gives 128 numbers for a face of 112 px whose eyes, nose and mouth lie where it learned them.
OpenCV takes two faces for one person's from a cosine of 0.363 on.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np

from dheads.errors import DheadsError
from dheads.faces.alignment import EYES, warp
from dheads.weights.fetching import fetch

_SIZE, _DIM = 112, 128  # px of a face, numbers of an embedding
# Where SFace wants the left eye of the picture, the right one, the tip of the nose, and the corners of the mouth, px.
_TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
_NOSE_AND_MOUTH = [30, 48, 54]


class Recogniser:
    """SFace, run by cv2.dnn: cv2.FaceRecognizerSF does the same, but warns of OpenCV 5's engine at every start."""

    def __init__(self, net: cv2.dnn.Net) -> None:
        self._net = net

    def __call__(self, frame: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        """The embedding (128,) float64, of length 1, of a frame (H, W, 3) uint8 RGB with landmarks (68, 2) px.

        NaN where the landmarks are NaN.
        """
        if not np.isfinite(landmarks).all():
            return np.full(_DIM, np.nan)
        self._net.setInput(cv2.dnn.blobFromImage(warp(frame, sface_transform(landmarks), _SIZE)))
        embedding = np.asarray(self._net.forward(), np.float64).ravel()
        return embedding / np.linalg.norm(embedding)


def load_recogniser(progress: bool = True) -> Recogniser:
    """SFace, downloaded at the first call. Raises DheadsError, which says where the file belongs."""
    path = fetch("sface", progress)
    try:
        return Recogniser(cv2.dnn.readNetFromONNX(np.fromfile(path, np.uint8)))
    except cv2.error as error:
        raise DheadsError(f"OpenCV {cv2.__version__} cannot open {path}: install another opencv-python") from error


def similarity(
    recogniser: Recogniser,
    frames: Iterable[np.ndarray],
    landmarks: np.ndarray,
    identity_frame: np.ndarray,
    identity_landmarks: np.ndarray,
) -> np.ndarray:
    """The cosine (F,) of every frame's embedding with the identity frame's: 1 for the same picture, NaN without a face.

    frames: F of (H, W, 3) uint8 RGB with landmarks (F, 68, 2) px, a NaN row where there is no face; identity_frame
    (H, W, 3) with (68, 2). Raises DheadsError where the identity frame has no face.
    """
    identity = recogniser(identity_frame, identity_landmarks)
    if np.isnan(identity).any():
        raise DheadsError("the identity frame has no face to compare with; take another frame")
    return np.array([recogniser(frame, row) @ identity for frame, row in zip(frames, landmarks, strict=True)])


def sface_transform(landmarks: np.ndarray) -> np.ndarray:
    """The similarity (2, 3) that lays a face's landmarks (68, 2) px, by least squares, where SFace wants them."""
    eyes = [landmarks[eye].mean(axis=0) for eye in EYES]
    source, target = np.stack([*eyes, *landmarks[_NOSE_AND_MOUTH]]) @ (1, 1j), _TEMPLATE @ (1, 1j)  # (5,)
    # w = a z + b; a = sum conj(z - mean z) (w - mean w) / sum |z - mean z|^2
    z = source - source.mean()
    a = (z.conj() * (target - target.mean())).sum() / (np.abs(z) ** 2).sum()
    b = target.mean() - a * source.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
