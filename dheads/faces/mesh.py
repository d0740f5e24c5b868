"""MediaPipe's networks, which the package carries: BlazeFace finds faces, the face mesh their landmarks."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from importlib import resources
from typing import Any

import cv2
import numpy as np

from dheads.faces.alignment import apply_transform, invert_transform, warp
from dheads.faces.detection import MIN_FACE_PX, Face, LandmarkBackend, View, area, covering, distinct, same_place

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


class MeshBackend(LandmarkBackend):
    """MediaPipe's BlazeFace (short range) and its 468-point face mesh, run by cv2.dnn."""

    DETECTOR_PX = 128  # BlazeFace was trained on these; as it only convolves, it takes multiples of them too
    MESH_PX = 192
    MIN_SCORE = 0.5
    # Upright faces of 452 photos score above 1 - 1e-11, most in video above 1 - 1e-8; upside down they score less than
    # 1 - 2e-5 as if they were upright.
    SURE_SCORE = 1 - 1e-7
    ROI_SCALE = 1.5  # the mesh sees the face's box enlarged by this

    def __init__(self) -> None:
        self._detector = load_net("face_detection_short_range.tflite")
        self._mesh = load_net("face_landmark.tflite")

    def detect(self, image: np.ndarray) -> list[Face]:
        return self.glance(image) or self._look(image, image, _fine_stages(*image.shape[:2]))

    def glance(self, image: np.ndarray) -> list[Face]:
        factor = max(1.0, max(image.shape[:2]) / _COARSE_PX)
        size = [max(1, round(length / factor)) for length in image.shape[1::-1]]
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if factor > 2 else image
        stages = _coarse_stages(*small.shape[:2])
        # BlazeFace sees most faces that are upside down, but not all.
        turned = ((cells, [view.turned(2) for view in views]) for cells, views in stages)
        return self._look(image, small, [*stages, *turned])

    def _look(self, image: np.ndarray, small: np.ndarray, stages: list[Stage]) -> list[Face]:
        """The faces in a picture of the first stage that shows any in the same picture, or a smaller copy of it."""
        factor = max(image.shape[:2]) / max(small.shape[:2])
        for cells, views in stages:
            rois = [roi.enlarged(factor) for view in views for roi in self._find(small, view, cells)]
            seen = (self._upright(image, roi) for roi in rois if roi.side >= 0.75 * MIN_FACE_PX * self.ROI_SCALE)
            if faces := [face for face in seen if face]:
                return sorted(distinct(faces), key=area, reverse=True)
        return []

    def follow(self, image: np.ndarray, last: Face) -> Face | None:
        face = self._settle(image, self._roi(last), 0.05)
        if face.score < self.MIN_SCORE or not same_place(face, last):
            return super().follow(image, last)
        # What the mesh sees depends on where it looks: sent to its own last box, it goes to and fro on a still picture.
        box = tuple(np.mean([last.box, face.box], axis=0).tolist())
        return dataclasses.replace(face, box=box)

    def _find(self, image: np.ndarray, view: View, cells: int) -> list[View]:
        """Where BlazeFace sees faces in a view of so many squares each way, as the views the mesh needs."""
        size = cells * self.DETECTOR_PX
        matrix = view.matrix(size)
        crop = warp(image, matrix, size)
        if np.ptp(crop) < _FLAT:
            return []
        self._detector.setInput(cv2.dnn.blobFromImage(crop.astype(np.float32) / 127.5 - 1))
        logits = self._detector.forward("classificators")[0, :, 0]  # (896 cells^2,)
        found = logits >= 0  # the sigmoid's 0.5
        if not found.any():
            return []
        raw = self._detector.forward("regressors")[0]  # (896 cells^2, 16): box centre, box size, 6 points
        points = raw[found].reshape(-1, 8, 2).astype(np.float64)
        points[:, [0, 2, 3, 4, 5, 6, 7]] += _anchors(cells)[found, None]
        boxes = [[*(p[0] - p[1] / 2), *p[1]] for p in points]
        keep = cv2.dnn.NMSBoxes(boxes, logits[found].tolist(), 0.0, 0.3)
        rois = []
        for p in points[np.array(keep, int).ravel()]:
            centre, eye_r, eye_l = apply_transform(invert_transform(matrix), p[[0, 2, 3]])
            side = p[1].max() * view.side / size * self.ROI_SCALE
            rois.append(View(*centre, side, math.atan2(*(eye_l - eye_r)[::-1])))
        return rois

    def _upright(self, image: np.ndarray, roi: View) -> Face | None:
        """The face in a view. Where the mesh doubts it, BlazeFace may have taken a forehead for a mouth."""
        face = self._settle(image, roi, 0.01)
        if face.score < self.SURE_SCORE:
            turned = [self._settle(image, roi.turned(quarters), 0.01) for quarters in (1, 2, 3)]
            face = max(face, *turned, key=lambda face: face.score)
        upside_down = face.landmarks[45, 0] < face.landmarks[36, 0]
        return face if face.score >= (self.SURE_SCORE if upside_down else self.MIN_SCORE) else None

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


def load_net(name: str) -> Any:
    model = resources.files("dheads").joinpath("assets", name).read_bytes()
    return cv2.dnn.readNetFromTFLite(np.frombuffer(model, np.uint8))


@cache
def _anchors(cells: int) -> np.ndarray:
    """BlazeFace's anchor centres (896 cells^2, 2) in px of its input of 128 cells px."""
    centres = []
    for stride, per_cell in ((8, 2), (16, 6)):
        y, x = np.mgrid[: cells * 128 // stride, : cells * 128 // stride]
        grid = (np.stack([x, y], axis=-1).reshape(-1, 2) + 0.5) * stride
        centres.append(np.repeat(grid, per_cell, axis=0))
    return np.concatenate(centres)


# ---- Where to search ----

# A stage of a search: views that cover the picture, of so many squares each way. BlazeFace sees faces from an eighth of
# a square's side, tilted by up to 55 degrees.
Stage = tuple[int, list[View]]
_SMALLEST = 0.125
_STEP = 3  # by which the squares of a stage are smaller than those of the stage before
_COARSE_PX = 2048  # of a large picture's side, for the first of it
_FLAT = 4  # levels of 255: with less contrast there is nothing to see
_CELLS = 4  # many squares at once take a third of the time, as they need not overlap


def _coarse_stages(height: int, width: int) -> list[Stage]:
    """All of the picture, all of it with room around a face that fills it, and quarters of it."""
    longest = max(height, width)
    shares = (1.0, 1.5, 0.5) if 0.5 * longest >= 3 * MIN_FACE_PX else (1.0, 1.5)
    return [(1, covering(height, width, share * longest, 0.5 * share * longest)) for share in shares]


def _fine_stages(height: int, width: int) -> list[Stage]:
    """Ever smaller squares, down to those in which the smallest faces can be seen."""
    longest, least = max(height, width), MIN_FACE_PX / _SMALLEST
    count = max(0, math.ceil(math.log(longest / 2 / least, _STEP)))
    stages = []
    for side in np.geomspace(longest / 2, least, count + 1)[1:].tolist():
        cells = min(_CELLS, math.ceil(longest / side))
        stages.append((cells, covering(height, width, cells * side, 0.5 * side)))
    return stages
