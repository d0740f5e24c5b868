"""Find the faces in a picture and their 68 landmarks (iBUG order), in px as `faces` counts them."""

from __future__ import annotations

import dataclasses
import math
import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import groupby, islice
from typing import Any

import cv2
import numpy as np
import torch

from dheads.errors import DheadsError
from dheads.faces import apply_transform, invert_transform, warp

MIN_FACE_PX = 32

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
        return _same_person(self.glance(image), last)

    def track(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        """Landmarks (F, 68, 2) float32 px of one person, the largest face at first; NaN where it is not seen."""
        last: Face | None = None
        rows = []
        for frame in frames:
            face = self.follow(frame, last) if last else _same_person(self.glance(frame), None)
            rows.append(face.landmarks if face else _UNSEEN)
            last = face or last
        return np.stack(rows) if rows else np.empty((0, 68, 2), np.float32)


def load_backend(name: str, device: str = "cpu") -> LandmarkBackend:
    """The backend `mesh` (packaged, on the CPU) or `fan` (face-alignment, downloads its weights)."""
    if name == "mesh":
        return MeshBackend()
    if name == "fan":
        return FanBackend(device)
    raise DheadsError(f"unknown landmark detector {name!r}; the known ones are fan, mesh")


def find_face(image: np.ndarray, backend: LandmarkBackend, name: str, which: int = 1) -> tuple[Face, int]:
    """A face of a photo, by default the largest, and how many there are. which: counted from the largest, 1.

    Raises DheadsError, naming the file, when there is no such face.
    """
    faces = backend.detect(image)
    if not faces:
        raise DheadsError(
            f"{name}: no face found; it takes a face at least {MIN_FACE_PX} px wide, seen from the front or half from "
            "the side, upright or tilted up to 45 degrees, with eyes and mouth in view"
        )
    if which > len(faces):
        count = f"{len(faces)} {'face' if len(faces) == 1 else 'faces'}"
        raise DheadsError(f"{name} shows {count}, so there is no face {which}")
    return faces[which - 1], len(faces)


_UNSEEN = np.full((68, 2), np.nan, np.float32)


@dataclass(frozen=True)
class View:
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
        self._detector = load_net("face_detection_short_range.tflite")
        self._mesh = load_net("face_landmark.tflite")

    def detect(self, image: np.ndarray) -> list[Face]:
        return self._look(image, _SEARCH)

    def glance(self, image: np.ndarray) -> list[Face]:
        return self._look(image, _GLANCE)

    def _look(self, image: np.ndarray, search: tuple[float, ...]) -> list[Face]:
        """The faces of the first stage of the search that shows any."""
        for share in search:
            rois = [roi for view in _views(*image.shape[:2], share) for roi in self._find(image, view)]
            faces = [face for roi in rois if (face := self._settle(image, roi, 0.01)).score >= self.MIN_SCORE]
            if faces:
                return sorted(_distinct(faces), key=_area, reverse=True)
        return []

    def follow(self, image: np.ndarray, last: Face) -> Face | None:
        face = self._settle(image, self._roi(last), 0.05)
        if face.score < self.MIN_SCORE or not _same_place(face, last):
            return super().follow(image, last)
        # What the mesh sees depends on where it looks: sent to its own last box, it goes to and fro on a still picture.
        box = tuple(np.mean([last.box, face.box], axis=0).tolist())
        return dataclasses.replace(face, box=box)

    def _find(self, image: np.ndarray, view: View) -> list[View]:
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
                rois.append(View(*centre, side * self.ROI_SCALE, math.atan2(*(eye_l - eye_r)[::-1])))
        return rois

    def _roi(self, face: Face) -> View:
        x0, y0, x1, y1 = face.box
        across = face.landmarks[45] - face.landmarks[36]
        side = max(x1 - x0, y1 - y0) * self.ROI_SCALE
        return View((x0 + x1) / 2, (y0 + y1) / 2, side, math.atan2(across[1], across[0]))

    def _settle(self, image: np.ndarray, roi: View, still: float) -> Face:
        """Mesh after mesh, each in the last one's box and angle, until they move by less than `still` views' sides."""
        for _ in range(10):
            face = self._fit(image, roi)
            last, roi = roi, self._roi(face)
            moved = math.dist((last.x, last.y, last.side), (roi.x, roi.y, roi.side))
            if face.score < self.MIN_SCORE or moved < still * roi.side:
                break
        return face

    def _fit(self, image: np.ndarray, roi: View) -> Face:
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

    BATCH = 16  # frames a batch of a video has at most
    BATCH_PX = 2**21  # pixels it has at most: S3FD takes 1.5 GB for these; larger frames are shrunk for it

    def __init__(self, device: str = "cpu") -> None:
        try:
            import face_alignment
        except ImportError:
            raise DheadsError("the landmark detector fan needs a package: pip install face-alignment") from None
        try:
            self._net = face_alignment.FaceAlignment(
                face_alignment.LandmarksType.TWO_D, device=device, compile=False, max_batch_size=self.BATCH
            )
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

    def track(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        last: Face | None = None
        rows = [np.empty((0, 68, 2), np.float32)]
        for batch in _batches(frames, self.BATCH, self.BATCH_PX):
            person = []
            for faces in self._boxes(batch):
                person.append(_same_person(faces, last))
                last = person[-1] or last
            rows.append(self._fit(batch, person))
        return np.concatenate(rows)

    def _boxes(self, frames: np.ndarray) -> list[list[Face]]:
        """The faces that S3FD sees in each of (B, H, W, 3) frames, their landmarks not looked for yet."""
        height, width = frames.shape[1:3]
        if min(height, width) < MIN_FACE_PX:  # S3FD's maps would be empty, which it takes for an error
            return [[] for _ in frames]
        scale = min(1, math.sqrt(self.BATCH_PX / (height * width)))
        if scale < 1:
            size = round(width * scale), round(height * scale)
            frames = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
        found = self._net.face_detector.detect_from_batch(torch.from_numpy(frames).movedim(-1, 1))
        return [[Face(_UNSEEN, float(b[4]), tuple(float(v) / scale for v in b[:4])) for b in boxes] for boxes in found]

    def _fit(self, frames: np.ndarray, person: list[Face | None]) -> np.ndarray:
        """Landmarks (B, 68, 2) of one face in each of (B, H, W, 3) frames; NaN where there is none."""
        landmarks = np.repeat(_UNSEEN[None], len(frames), axis=0)
        seen = [index for index, face in enumerate(person) if face]
        if not seen:
            return landmarks
        # face-alignment runs FAN on many faces at once only where they are in one picture, so the frames become one
        # tall picture. The bands between them are black, as FAN sees what is beyond a picture's edge.
        boxes = np.array([face.box for face in person if face])
        band = 2 * math.ceil((boxes[:, 2:] - boxes[:, :2]).max())
        tall = np.pad(frames[seen], ((0, 0), (band, band), (0, 0), (0, 0)))
        offsets = np.stack([np.zeros(len(seen)), band + np.arange(len(seen)) * tall.shape[1]], axis=-1)  # (S, 2)
        points = self._net.get_landmarks_from_image(
            tall.reshape(-1, *tall.shape[2:]), detected_faces=list(boxes + np.tile(offsets, 2))
        )
        landmarks[seen] = np.stack(points) - offsets[:, None]
        return landmarks

    def _detect(self, image: np.ndarray) -> list[Face]:
        if min(image.shape[:2]) < MIN_FACE_PX:
            return []
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


def _batches(frames: Iterable[np.ndarray], count: int, pixels: int) -> Iterator[np.ndarray]:
    """(B, H, W, 3) of up to `count` frames of one shape in a row, and of up to `pixels` each plane."""
    for (height, width, _), group in groupby(frames, key=np.shape):
        while batch := list(islice(group, max(1, min(count, pixels // (height * width))))):
            yield np.stack(batch)


def load_net(name: str) -> Any:
    model = resources.files("dheads").joinpath("assets", name).read_bytes()
    return cv2.dnn.readNetFromTFLite(np.frombuffer(model, np.uint8))


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


def _views(height: int, width: int, share: float) -> list[View]:
    """The squares of one stage, which cover the picture."""
    side = share * max(height, width)
    if share < 1 and side < 3 * MIN_FACE_PX:
        return []
    return [View(x, y, side) for y in _steps(height, side) for x in _steps(width, side)]


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


def _same_person(faces: list[Face], last: Face | None) -> Face | None:
    """The face of `last` among those of a later frame: the nearest at the same place; at first the largest."""
    if last is None:
        return max(faces, key=_area, default=None)
    near = [face for face in faces if _same_place(face, last)]
    return min(near, key=lambda face: math.dist(_centre(face), _centre(last)), default=None)


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
