"""Find a face, its 68 landmarks (iBUG order), and the similarity transform that lays it on the mean face.

Points are in pixels with (0, 0) at the centre of the top left pixel, as cv2.warpAffine takes them. A transform is a
(2, 3) matrix from the picture to the crop.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dheads.config import AlignmentConfig
from dheads.errors import DheadsError

PHOTOS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})  # file endings
PHOTO_SIDE_PX = 4096  # a longer photo is reduced to this
PHOTO_LIMIT_PX = 400_000_000
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")  # EPS would run a program
MIN_FACE_PX = 32

EYES = np.arange(36, 42), np.arange(42, 48)
MOUTH = np.arange(48, 68)
# What talking, blinking and raised eyebrows do not move: the upper jaw line, the nose, the corners of the eyes.
STABLE = np.array([0, 1, 2, 3, 13, 14, 15, 16, *range(27, 36), 36, 39, 42, 45])

# Mesh vertex of each iBUG landmark.
MESH_TO_68 = np.array(
    [
        *(162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389),  # jaw
        *(71, 63, 105, 66, 107, 336, 296, 334, 293, 301),  # eyebrows
        *(168, 197, 5, 4, 75, 97, 2, 326, 305),  # nose
        *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),  # eyes
        *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181),  # outer lips
        *(78, 82, 13, 312, 308, 317, 14, 87),  # inner lips
    ]
)


# ---- Photos ----


def load_photo(path: Path) -> np.ndarray:
    """A photo as (H, W, 3) uint8 RGB: turned upright by its EXIF tag, alpha over white, long side at most 4096 px.

    Raises DheadsError where there is no readable picture, or one of more than 400 megapixels.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = PHOTO_LIMIT_PX
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd tags
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=PHOTO_FORMATS) as photo:
                photo.draft(None, (PHOTO_SIDE_PX, PHOTO_SIDE_PX))
                photo = _to_rgb(ImageOps.exif_transpose(photo))
    except FileNotFoundError:
        raise DheadsError(f"{path}: there is no such file; check the path of the photo") from None
    except (IsADirectoryError, PermissionError) as error:
        kind = "is a folder" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise DheadsError(f"{path}: {kind}; name a photo such as a JPEG or PNG file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DheadsError(f"{path}: the photo has more than 400 megapixels; reduce it first") from None
    except UnidentifiedImageError:
        raise DheadsError(f"{path}: this is not a photo in a known format; save it as JPEG or PNG") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DheadsError(f"{path}: the photo is damaged ({error}); export or copy it again") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    photo.thumbnail((PHOTO_SIDE_PX, PHOTO_SIDE_PX), Image.Resampling.LANCZOS)
    return np.array(photo)


def _to_rgb(photo: Image.Image) -> Image.Image:
    if photo.mode.startswith(("I", "F")):  # 16 or 32 bits: convert() would clip
        values = np.asarray(photo).astype(np.float64)
        scales = [65535.0] if ";16" in photo.mode else [1.0, 255.0, 65535.0, 2.0**32 - 1]
        full_scale = next((s for s in scales if values.max() <= s), values.max())
        photo = Image.fromarray(np.round(np.clip(values / full_scale, 0, 1) * 255).astype(np.uint8))
    if photo.has_transparency_data:
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo.convert("RGB")


# ---- Detection ----


@dataclass(frozen=True)
class Face:
    landmarks: np.ndarray  # (68, 2) float32 px
    score: float  # 0 to 1
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 px of the whole face


class LandmarkBackend(ABC):
    """A detector of faces and their 68 landmarks."""

    @abstractmethod
    def detect(self, image: np.ndarray) -> list[Face]:
        """The faces of a (H, W, 3) uint8 RGB picture, largest first."""

    def glance(self, image: np.ndarray) -> list[Face]:
        """As `detect`, but for one of many frames: quick, at the price of small faces."""
        return self.detect(image)

    def follow(self, image: np.ndarray, last: Face) -> Face | None:
        """The face of `last`, seen in an earlier frame, in this frame."""
        near = [face for face in self.glance(image) if _same_place(face, last)]
        return min(near, key=lambda face: math.dist(_centre(face), _centre(last)), default=None)

    def track(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """Landmarks (F, 68, 2) float32 px of one person, the largest face at first; NaN where it is not seen."""
        last: Face | None = None
        rows = []
        for frame in frames:
            face = next(iter(self.glance(frame)), None) if last is None else self.follow(frame, last)
            rows.append(np.full((68, 2), np.nan, np.float32) if face is None else face.landmarks)
            last = face or last
        return np.stack(rows) if rows else np.empty((0, 68, 2), np.float32)


def load_backend(name: str, device: str = "cpu") -> LandmarkBackend:
    """The backend `mesh` (packaged, on the CPU) or `fan` (face-alignment, downloads its weights)."""
    if name == "mesh":
        return MeshBackend()
    if name == "fan":
        return FanBackend(device)
    raise DheadsError(f"unknown landmark detector {name!r}; the known ones are fan, mesh")


def find_face(image: np.ndarray, backend: LandmarkBackend, name: str) -> tuple[Face, int]:
    """The largest face of a photo and how many there are. Raises DheadsError, naming the file, when there is none."""
    faces = backend.detect(image)
    if not faces:
        raise DheadsError(
            f"{name}: no face found; it takes a face at least {MIN_FACE_PX} px wide, seen from the front or half from "
            "the side, upright or tilted up to 45 degrees, with eyes and mouth in view"
        )
    return faces[0], len(faces)


@dataclass(frozen=True)
class _View:
    """A square of the picture, turned by `angle` (radians, clockwise on the screen)."""

    x: float
    y: float
    side: float
    angle: float = 0.0

    def matrix(self, size: int) -> np.ndarray:  # (2, 3), picture to view
        c, s = math.cos(self.angle) * size / self.side, math.sin(self.angle) * size / self.side
        m = (size - 1) / 2
        return np.array([[c, s, m - c * self.x - s * self.y], [-s, c, m + s * self.x - c * self.y]])


class MeshBackend(LandmarkBackend):
    """MediaPipe's BlazeFace (short range) and its 468-point face mesh, run by cv2.dnn."""

    DETECTOR_PX = 128
    MESH_PX = 192
    MIN_SCORE = 0.5
    ROI_SCALE = 1.5  # the mesh sees the face's box enlarged by this

    def __init__(self) -> None:
        self._detector = _load_net("face_detection_short_range.tflite")
        self._mesh = _load_net("face_landmark.tflite")

    def detect(self, image: np.ndarray) -> list[Face]:
        return self._look(image, _SEARCH)

    def glance(self, image: np.ndarray) -> list[Face]:
        return self._look(image, _GLANCE)

    def _look(self, image: np.ndarray, search: tuple[float, ...]) -> list[Face]:
        """The faces of the first stage of the search that shows any."""
        for share in search:
            rois = [roi for view in _views(*image.shape[:2], share) for roi in self._find(image, view)]
            faces = [face for roi in rois if (face := self._settle(image, roi)).score >= self.MIN_SCORE]
            if faces:
                return sorted(_distinct(faces), key=_area, reverse=True)
        return []

    def follow(self, image: np.ndarray, last: Face) -> Face | None:
        face = self._fit(image, self._roi(last))
        return face if face.score >= self.MIN_SCORE and _same_place(face, last) else super().follow(image, last)

    def _find(self, image: np.ndarray, view: _View) -> list[_View]:
        """Where BlazeFace sees faces in a view, as the views the mesh needs."""
        size = self.DETECTOR_PX
        matrix = view.matrix(size)
        crop = warp(image, matrix, size)
        self._detector.setInput(cv2.dnn.blobFromImage(crop.astype(np.float32) / 127.5 - 1))
        logits = self._detector.forward("classificators")[0, :, 0]  # (896,)
        found = logits >= 0  # the sigmoid's 0.5
        if not found.any():
            return []
        raw = self._detector.forward("regressors")[0]  # (896, 16): box centre, box size, 6 points
        points = raw[found].reshape(-1, 8, 2).astype(np.float64)
        points[:, [0, 2, 3, 4, 5, 6, 7]] += _anchors()[found, None]
        boxes = [[*(p[0] - p[1] / 2), *p[1]] for p in points]
        keep = cv2.dnn.NMSBoxes(boxes, logits[found].tolist(), 0.0, 0.3)
        rois = []
        for p in points[np.array(keep, int).ravel()]:
            centre, eye_r, eye_l = apply_transform(invert_transform(matrix), p[[0, 2, 3]])
            side = p[1].max() * view.side / size
            if side >= MIN_FACE_PX * 0.75:
                rois.append(_View(*centre, side * self.ROI_SCALE, math.atan2(*(eye_l - eye_r)[::-1])))
        return rois

    def _roi(self, face: Face) -> _View:
        x0, y0, x1, y1 = face.box
        across = face.landmarks[45] - face.landmarks[36]
        side = max(x1 - x0, y1 - y0) * self.ROI_SCALE
        return _View((x0 + x1) / 2, (y0 + y1) / 2, side, math.atan2(across[1], across[0]))

    def _settle(self, image: np.ndarray, roi: _View) -> Face:
        """Mesh after mesh, each in the last one's box and angle, which are better than the detector's."""
        for _ in range(10):
            face = self._fit(image, roi)
            last, roi = roi, self._roi(face)
            moved = math.dist((last.x, last.y, last.side), (roi.x, roi.y, roi.side))
            if face.score < self.MIN_SCORE or moved < 0.01 * roi.side:
                break
        return face

    def _fit(self, image: np.ndarray, roi: _View) -> Face:
        matrix = roi.matrix(self.MESH_PX)
        crop = warp(image, matrix, self.MESH_PX)
        self._mesh.setInput(cv2.dnn.blobFromImage(crop.astype(np.float32) / 255))
        vertices = self._mesh.forward("conv2d_20").reshape(468, 3)[:, :2]
        logit = float(self._mesh.forward("conv2d_30").item())
        vertices = apply_transform(invert_transform(matrix), vertices.astype(np.float64)).astype(np.float32)
        box = (*vertices.min(axis=0).tolist(), *vertices.max(axis=0).tolist())
        return Face(vertices[MESH_TO_68], 1 / (1 + math.exp(-logit)), box)


class FanBackend(LandmarkBackend):
    """face-alignment's FAN (Bulat and Tzimiropoulos 2017) with its S3FD detector: the paper's landmarks."""

    def __init__(self, device: str = "cpu") -> None:
        try:
            import face_alignment
            import torch
        except ImportError:
            raise DheadsError("the landmark detector fan needs a package: pip install face-alignment") from None
        try:
            self._net = face_alignment.FaceAlignment(face_alignment.LandmarksType.TWO_D, device=device, compile=False)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise DheadsError(
                f"the landmark detector fan cannot load its weights ({error}); go online to www.adrianbulat.com, "
                f"or put 2DFAN4-11f355bf06.pth.tar and s3fd-619a316812.pth into {torch.hub.get_dir()}/checkpoints"
            ) from None

    def detect(self, image: np.ndarray) -> list[Face]:
        if faces := self._detect(image):
            return faces
        (whole,) = _views(*image.shape[:2], 1.5)
        for degrees in (-40, 40):  # S3FD and FAN know faces near to upright
            matrix = dataclasses.replace(whole, angle=math.radians(degrees)).matrix(size := round(whole.side))
            if faces := self._detect(warp(image, matrix, size)):
                return [_moved(face, invert_transform(matrix)) for face in faces]
        return []

    def _detect(self, image: np.ndarray) -> list[Face]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No faces were detected")
            points, _, boxes = self._net.get_landmarks_from_image(image, return_bboxes=True)
        if not points:
            return []
        faces = [
            Face(np.asarray(p, np.float32)[:, :2], float(b[4]), tuple(float(v) for v in b[:4]))
            for p, b in zip(points, boxes, strict=True)
        ]
        return sorted(faces, key=_area, reverse=True)


def _asset(name: str) -> bytes:
    return resources.files("dheads").joinpath("assets", name).read_bytes()


def _load_net(name: str) -> Any:
    return cv2.dnn.readNetFromTFLite(np.frombuffer(_asset(name), np.uint8))


@cache
def _anchors() -> np.ndarray:
    """BlazeFace's anchor centres (896, 2) in px of its 128 px input."""
    centres = []
    for stride, per_cell in ((8, 2), (16, 6)):
        y, x = np.mgrid[: 128 // stride, : 128 // stride]
        cells = (np.stack([x, y], axis=-1).reshape(-1, 2) + 0.5) * stride
        centres.append(np.repeat(cells, per_cell, axis=0))
    return np.concatenate(centres)


# The squares of each stage of a search, in sides of the picture: all of it, all of it with room around a face that
# fills it, ever smaller tiles. BlazeFace sees faces from 0.15 of a square's side, tilted by up to 55 degrees.
_GLANCE = (1.0, 1.5, 0.5)
_SEARCH = (*_GLANCE, 0.25, 0.125)


def _views(height: int, width: int, share: float) -> list[_View]:
    """The squares of one stage, which cover the picture."""
    side = share * max(height, width)
    if share < 1 and side < 3 * MIN_FACE_PX:
        return []
    return [_View(x, y, side) for y in _steps(height, side) for x in _steps(width, side)]


def _steps(length: int, side: float) -> np.ndarray:
    """The squares' centres along one side. Neighbours share half, so that a head cut by one is whole in the next."""
    count = 1 + max(0, math.ceil((length - side) / (0.5 * side)))
    margin = min(side, length) / 2
    return np.linspace(margin, length - margin, count) - 0.5


def _centre(face: Face) -> tuple[float, float]:
    x0, y0, x1, y1 = face.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def _area(face: Face) -> float:
    x0, y0, x1, y1 = face.box
    return (x1 - x0) * (y1 - y0)


def _moved(face: Face, matrix: np.ndarray) -> Face:
    """A face through a transform; its box becomes the landmarks' own."""
    landmarks = apply_transform(matrix, face.landmarks).astype(np.float32)
    box = (*landmarks.min(axis=0).tolist(), *landmarks.max(axis=0).tolist())
    return Face(landmarks, face.score, box)


def _same_place(face: Face, last: Face) -> bool:
    """Near enough to be the same person some frames later: less than a face away, of like size."""
    side, last_side = math.sqrt(_area(face)), math.sqrt(_area(last))
    return 0.5 < side / last_side < 2 and math.dist(_centre(face), _centre(last)) < last_side


def _distinct(faces: list[Face]) -> list[Face]:
    """The faces without those that two views saw twice."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: face.score, reverse=True):
        if all(math.dist(_centre(face), _centre(k)) > 0.5 * math.sqrt(max(_area(face), _area(k))) for k in kept):
            kept.append(face)
    return kept


# ---- Alignment ----


@cache
def _unit_mean_face() -> np.ndarray:
    return np.load(io.BytesIO(_asset("mean_face.npy")))


def mean_face(alignment: AlignmentConfig, size: int) -> np.ndarray:
    """The mean face (68, 2) float32 px in a crop of `size` px: the eyes level, centred, where `alignment` says."""
    # Lengths count from the crop's edge, points from the centre of its first pixel.
    eyes = np.array([0.5, alignment.eye_y]) * size - 0.5
    return (_unit_mean_face() * alignment.eye_distance * size + eyes).astype(np.float32)


def align_transforms(landmarks: np.ndarray, alignment: AlignmentConfig, size: int) -> np.ndarray:
    """Similarities (F, 2, 3) float64 that lay landmarks (F, 68, 2) px, smoothed over time, on the mean face.

    Least squares over the points that talking does not move. A NaN row gives a NaN transform.
    """
    source = _smooth(landmarks.astype(np.float64), alignment.smooth_frames)[:, STABLE] @ (1, 1j)  # (F, P)
    target = mean_face(alignment, size).astype(np.float64)[STABLE] @ (1, 1j)  # (P,)
    # w = a z + b; a = sum conj(z - mean z) (w - mean w) / sum |z - mean z|^2. A complex factor cannot mirror.
    z = source - source.mean(axis=1, keepdims=True)
    w = target - target.mean()
    a = (z.conj() * w).sum(axis=1) * (1 / (np.abs(z) ** 2).sum(axis=1))
    b = target.mean() - a * source.mean(axis=1)
    return np.stack([a.real, -a.imag, b.real, a.imag, a.real, b.imag], axis=-1).reshape(-1, 2, 3)


def _smooth(landmarks: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian over time, in frames. It passes over NaN rows, which stay NaN; at the ends it is renormalised."""
    if sigma <= 0 or len(landmarks) < 2:
        return landmarks
    seen = np.isfinite(landmarks).all(axis=(1, 2))[:, None]
    rows = np.column_stack([np.where(seen, landmarks.reshape(len(landmarks), -1), 0), seen])  # last: the weights
    window = (1, 2 * math.ceil(4 * sigma) + 1)
    sums = cv2.GaussianBlur(rows, window, sigmaX=sigma, sigmaY=sigma, borderType=cv2.BORDER_CONSTANT)
    smoothed = np.full_like(sums[:, :-1], np.nan)
    return np.divide(sums[:, :-1], sums[:, -1:], out=smoothed, where=seen).reshape(landmarks.shape)


def fill_gaps(landmarks: np.ndarray, max_gap: int) -> np.ndarray:
    """Landmarks (F, 68, 2) with gaps of up to `max_gap` NaN rows filled: linearly, at the ends by the nearest row."""
    seen = np.flatnonzero(np.isfinite(landmarks).all(axis=(1, 2)))
    filled = landmarks.copy()
    if len(seen) == 0:
        return filled
    edges = [-1, *seen, len(landmarks)]
    for before, after in itertools.pairwise(edges):
        if not 0 < after - before - 1 <= max_gap:
            continue
        first = landmarks[max(before, seen[0])]
        last = landmarks[min(after, seen[-1])]
        weight = (np.arange(before + 1, after) - before)[:, None, None] / (after - before)
        filled[before + 1 : after] = first + weight * (last - first)
    return filled


def apply_transform(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 2) px through a (2, 3) matrix."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def invert_transform(matrix: np.ndarray) -> np.ndarray:
    """The (2, 3) matrix of the way back."""
    inverse = np.linalg.inv(matrix[:, :2])
    return np.column_stack([inverse, -inverse @ matrix[:, 2]])


def warp(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """The crop (size, size, 3) uint8 of a picture; beyond the picture's edge its last pixels are repeated."""
    return _resample(image, matrix, (size, size), cv2.BORDER_REPLICATE)


def unwarp(crop: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A crop back at its place in a picture of that shape (H, W, ...); black around it."""
    return _resample(crop, invert_transform(matrix), (shape[1], shape[0]), cv2.BORDER_CONSTANT)


def _resample(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], border: int) -> np.ndarray:
    """cv2.warpAffine to (width, height) that averages where it shrinks, as pixels skipped would flicker."""
    scale = math.sqrt(abs(np.linalg.det(matrix[:, :2])))
    factor = max(1, int(1 / scale))
    if factor > 1:
        image, matrix = _reduce(image, matrix, size, factor)
        scale *= factor
    if scale < 1:
        # The blur that a unit pixel lacks to be a pixel of the shrunken picture.
        image = cv2.GaussianBlur(
            image, (0, 0), 0.5 * math.sqrt(1 / scale**2 - 1) + 1e-3, borderType=cv2.BORDER_REPLICATE
        )
    return cv2.warpAffine(image, matrix, size, flags=cv2.INTER_CUBIC, borderMode=border)


def _reduce(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], factor: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of the picture that a crop of that size shows, reduced by a whole factor, and its transform."""
    height, width = image.shape[:2]
    corners = apply_transform(invert_transform(matrix), np.array([(0, 0), (size[0], 0), (0, size[1]), size], float))
    margin = 4 * factor
    x0, y0 = np.clip(np.floor(corners.min(axis=0)).astype(int) - margin, 0, (width - 1, height - 1))
    x1, y1 = np.clip(np.ceil(corners.max(axis=0)).astype(int) + margin, (x0 + 1, y0 + 1), (width, height))
    part = image[y0:y1, x0:x1]
    bottom, right = -part.shape[0] % factor, -part.shape[1] % factor
    part = cv2.copyMakeBorder(part, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
    part = cv2.resize(part, (part.shape[1] // factor, part.shape[0] // factor), interpolation=cv2.INTER_AREA)
    # x = factor u + x0 + (factor - 1) / 2, from the reduced part's u to the picture's x
    offset = np.array([x0, y0]) + (factor - 1) / 2
    return part, np.column_stack([matrix[:, :2] * factor, apply_transform(matrix, offset)])


# ---- Measures ----


def mouth_box(landmarks: np.ndarray, size: int, margin: float = 5 / 128) -> np.ndarray:
    """The mouth's box (..., 4) int, x0 y0 x1 y1 half-open px, of landmarks (..., 68, 2) in a crop of `size` px.

    Enlarged by `margin` times the size on each side (the paper: 5 px at 128), inside the crop, never empty.
    """
    mouth = landmarks[..., MOUTH, :]
    low = np.floor(mouth.min(axis=-2) - margin * size)
    high = np.ceil(mouth.max(axis=-2) + margin * size) + 1
    low = np.clip(low, 0, size - 1)
    return np.concatenate([low, np.clip(high, low + 1, size)], axis=-1).astype(int)


def _distance(landmarks: np.ndarray, a: int, b: int) -> np.ndarray:
    return np.linalg.norm(landmarks[..., a, :] - landmarks[..., b, :], axis=-1)


def _eye_axis(landmarks: np.ndarray) -> np.ndarray:
    return landmarks[..., EYES[1], :].mean(axis=-2) - landmarks[..., EYES[0], :].mean(axis=-2)


def eye_distance(landmarks: np.ndarray) -> np.ndarray:
    """Between the eyes' centres, px, of landmarks (..., 68, 2)."""
    return np.linalg.norm(_eye_axis(landmarks), axis=-1)


def _height(landmarks: np.ndarray, lower: list[int], upper: list[int]) -> np.ndarray:
    """How far points lie below others, along the face's own down direction, in eye distances; the pairs' mean."""
    x, y = np.moveaxis(_eye_axis(landmarks), -1, 0)
    down = np.stack([-y, x], axis=-1) / (x**2 + y**2)[..., None]
    between = (landmarks[..., lower, :] - landmarks[..., upper, :]).mean(axis=-2)
    return (between * down).sum(axis=-1)


def mouth_opening(landmarks: np.ndarray) -> np.ndarray:
    """Between the inner lips, in eye distances, signed: zero when closed, below it when the lips' lines cross."""
    return _height(landmarks, [67, 66, 65], [61, 62, 63])


def mouth_width(landmarks: np.ndarray) -> np.ndarray:
    """Between the mouth's corners, in eye distances."""
    return _distance(landmarks, 48, 54) / eye_distance(landmarks)


def lip_thickness(landmarks: np.ndarray) -> np.ndarray:
    """Both lips together, in eye distances: the outer height less the opening."""
    return _height(landmarks, [58, 57, 56], [50, 51, 52]) - mouth_opening(landmarks)


def eye_openness(landmarks: np.ndarray) -> np.ndarray:
    """The eye aspect ratio (Soukupova and Cech 2016), mean of both eyes: about 0.3 open, 0.1 shut."""
    return sum(
        (_distance(landmarks, i + 1, i + 5) + _distance(landmarks, i + 2, i + 4)) / _distance(landmarks, i, i + 3) / 4
        for i in (36, 42)
    )
