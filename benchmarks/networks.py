"""Identity and head pose as networks see them that cannot ship in the package, for what they were trained on.

MobileFaceNet (Chen et al. 2018), an ONNX file (1, 3, 112, 112) -> (1, 128), and FSA-Net (Yang et al. 2019), ONNX files
(1, 3, 64, 64) -> (1, 3): yaw, pitch and roll in degrees, of which the mean over the files is taken.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from dheads.errors import DheadsError
from dheads.evaluation.footage import Footage
from dheads.evaluation.measures import pose_range, pose_speed
from dheads.evaluation.recognition import sface_transform, similarity
from dheads.faces.alignment import warp

ANGLES = ("yaw", "pitch", "roll")
IDENTITY_STRIDE = 5  # frames from one that is compared to the next: an identity changes slowly
SMOOTH_FRAMES = 1.5  # as for the poses from landmarks
_FACE_PX, _HEAD_PX = 112, 64
_MEAN, _STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
_BROW_SHARE = 1.25  # of the height from brows to chin: a face box reaches up to the hair
_HEAD_SHARE = 1.2  # of the face box


class IdentityNet:
    """The similarity of the faces of a video to a real frame."""

    def __init__(self, path: Path) -> None:
        self._net = opened(path)

    def __call__(self, frame: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        """The embedding (128,), of length 1, of a frame (H, W, 3) with landmarks (68, 2) px; NaN for NaN landmarks."""
        if not np.isfinite(landmarks).all():
            return np.full(128, np.nan)
        face = warp(frame, sface_transform(landmarks), _FACE_PX)  # SFace and MobileFaceNet share ArcFace's template
        normal = (face.astype(np.float32) / 255 - _MEAN) / _STD
        self._net.setInput(cv2.dnn.blobFromImage(normal))
        embedding = np.asarray(self._net.forward(), np.float64).ravel()
        return embedding / np.linalg.norm(embedding)

    def measure(self, video: Footage, truth: Footage) -> dict[str, float]:
        """The mean cosine of a video's frames with the first real one, which itself is left out."""
        first = int(truth.seen.argmax())
        identity = next(islice(truth.read(), first, None)), truth.landmarks[first]
        rows = slice(first + IDENTITY_STRIDE, None, IDENTITY_STRIDE)
        frames = islice(video.read(), rows.start, None, rows.step)
        return {"net_identity": float(np.nanmean(similarity(self, frames, video.landmarks[rows], *identity)))}


class HeadPoseNet:
    """How far and how fast a head turns in a video."""

    def __init__(self, paths: list[Path]) -> None:
        self._nets = [opened(path) for path in paths]

    def __call__(self, frame: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        """The angles (3,) in degrees of a frame (H, W, 3) with landmarks (68, 2) px; NaN for NaN landmarks."""
        if not np.isfinite(landmarks).all():
            return np.full(len(ANGLES), np.nan)
        (left, top), (right, bottom) = landmarks.min(axis=0), landmarks.max(axis=0)
        height = _BROW_SHARE * (bottom - top)
        side = _HEAD_SHARE * max(right - left, height)
        corner = np.array([(left + right) / 2, bottom - height / 2]) - side / 2
        scale = _HEAD_PX / side
        head = warp(frame, np.column_stack([np.eye(2) * scale, -corner * scale]), _HEAD_PX)
        blob = cv2.dnn.blobFromImage(head, 1 / 128, mean=(127.5, 127.5, 127.5), swapRB=True)  # BGR
        angles = []
        for net in self._nets:
            net.setInput(blob)
            angles.append(np.asarray(net.forward(), np.float64).ravel())
        return np.mean(angles, axis=0)

    def measure(self, video: Footage, truth: Footage) -> dict[str, float]:
        """Range and speed of each angle, in degrees and degrees a frame."""
        angles = np.stack([self(*pair) for pair in zip(video.read(), video.landmarks, strict=True)])
        steady = cv2.GaussianBlur(angles[np.isfinite(angles).all(axis=1)], (1, 0), sigmaX=1e-3, sigmaY=SMOOTH_FRAMES)
        properties = {"net_range": pose_range(steady), "net_speed": pose_speed(steady)}
        return {
            f"{name}_{angle}": float(values[i]) for name, values in properties.items() for i, angle in enumerate(ANGLES)
        }


def load_networks(identity: Path | None, pose: tuple[Path, Path] | None) -> list[IdentityNet | HeadPoseNet]:
    """The networks whose files are given. Raises DheadsError for a file that OpenCV cannot open."""
    networks: list[IdentityNet | HeadPoseNet] = []
    if identity is not None:
        networks.append(IdentityNet(identity))
    if pose is not None:
        networks.append(HeadPoseNet(list(pose)))
    return networks


def opened(path: Path) -> cv2.dnn.Net:
    try:
        return cv2.dnn.readNetFromONNX(np.fromfile(path, np.uint8))
    except (OSError, cv2.error) as error:
        raise DheadsError(f"{path}: is no ONNX file that OpenCV {cv2.__version__} opens; give another file") from error
