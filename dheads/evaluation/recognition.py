"""The similarity of a face to an identity: the cosine of face embeddings by OpenCV's SFace.

SFace (Zhong et al., 2021) embeds a face of 112 px, aligned to the positions of eyes, nose and mouth of its training
data, as 128 numbers. OpenCV takes two faces for the same person's from a cosine of 0.363 on.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np

from dheads.errors import DheadsError
from dheads.faces.alignment import EYES, fit_similarity, warp
from dheads.weights.fetching import fetch

_SIZE, _DIM = 112, 128  # px of an aligned face, dimensions of its embedding
# Positions in an aligned face of the eye on the left, the right one, the tip of the nose, and the mouth's corners, px.
_TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
_NOSE_AND_MOUTH = [30, 48, 54]


class Recogniser:
    """SFace, run by cv2.dnn, as cv2.FaceRecognizerSF prints a warning about OpenCV 5's engine at every start."""

    def __init__(self, net: cv2.dnn.Net) -> None:
        self._net = net

    def __call__(self, frame: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        """The embedding (128,) float64, of length 1, of a frame (H, W, 3) uint8 RGB with landmarks (68, 2) px.

        NaN if the landmarks are NaN.
        """
        if not np.isfinite(landmarks).all():
            return np.full(_DIM, np.nan)
        self._net.setInput(cv2.dnn.blobFromImage(warp(frame, sface_transform(landmarks), _SIZE)))
        embedding = np.asarray(self._net.forward(), np.float64).ravel()
        return embedding / np.linalg.norm(embedding)


def load_recogniser(progress: bool = True) -> Recogniser:
    """SFace, downloaded on first use. Raises DheadsError if the download fails or OpenCV cannot open the file."""
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
    """The cosine (F,) of each frame's embedding with that of the identity frame; NaN in frames without a face.

    frames: F of (H, W, 3) uint8 RGB, with landmarks (F, 68, 2) px, NaN in frames without a face. identity_frame:
    (H, W, 3) uint8 RGB, with landmarks (68, 2) px. Raises DheadsError if it has no face.
    """
    identity = recogniser(identity_frame, identity_landmarks)
    if np.isnan(identity).any():
        raise DheadsError("the identity frame has no face to compare with; take another frame")
    return np.array([recogniser(frame, row) @ identity for frame, row in zip(frames, landmarks, strict=True)])


def sface_transform(landmarks: np.ndarray) -> np.ndarray:
    """The least-squares similarity transform (2, 3) of landmarks (68, 2) px to the positions that SFace expects."""
    eyes = [landmarks[eye].mean(axis=0) for eye in EYES]
    return fit_similarity(np.stack([*eyes, *landmarks[_NOSE_AND_MOUTH]]), _TEMPLATE)
