"""The packaged landmark detector: MediaPipe's BlazeFace finds faces, its face mesh their landmarks."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import cv2
import numpy as np

from dheads.faces.alignment import apply_transform, invert_transform, warp
from dheads.faces.detection import MIN_FACE_PX, Face, LandmarkBackend, View, area, covering, distinct, same_place
from dheads.faces.litert import FaceNet

# The mesh vertex of each iBUG landmark.
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
    """MediaPipe's BlazeFace (short range) and its 468-point face mesh."""

    DETECTOR_PX = 128  # input size of BlazeFace in training; being convolutional, it takes multiples of it too
    MESH_PX = 192
    MIN_SCORE = 0.5
    # Upright faces score above 1 - 1e-11 in 452 photos, mostly above 1 - 1e-8 in video; faces that are fitted upside
    # down score less than 1 - 2e-5.
    SURE_SCORE = 1 - 1e-7
    ROI_SCALE = 1.5  # side of the mesh's view over that of the face's box

    def __init__(self) -> None:
        self._detector = FaceNet("face_detection_short_range.tflite")
        self._mesh = FaceNet("face_landmark.tflite")

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
        """The faces of the first stage in which BlazeFace finds any in `small`, a reduced copy of the picture."""
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
        # The mesh depends on its view: if it always took its own last box, it would oscillate on a still picture.
        x0, y0, x1, y1 = np.mean([last.box, face.box], axis=0).tolist()
        return dataclasses.replace(face, box=(x0, y0, x1, y1))

    def _find(self, image: np.ndarray, view: View, cells: int) -> list[View]:
        """The faces that BlazeFace finds in a view of `cells` x `cells` squares, as views for the mesh."""
        size = cells * self.DETECTOR_PX
        matrix = view.matrix(size)
        crop = warp(image, matrix, size)
        if np.ptp(crop) < _FLAT:
            return []
        outputs = self._detector(crop.astype(np.float32) / 127.5 - 1)
        logits = outputs["classificators"][:, 0]  # (896 cells^2,)
        found = logits >= 0  # the sigmoid's 0.5
        if not found.any():
            return []
        # Of each anchor (896 cells^2, 16): the box's centre and size, and 6 points.
        points = outputs["regressors"][found].reshape(-1, 8, 2).astype(np.float64)
        points[:, [0, 2, 3, 4, 5, 6, 7]] += _anchors(cells)[found, None]
        boxes = [[*(p[0] - p[1] / 2), *p[1]] for p in points]
        keep = cv2.dnn.NMSBoxes(boxes, logits[found].tolist(), 0.0, 0.3)
        rois = []
        for p in points[np.array(keep, int).ravel()]:
            centre, eye_r, eye_l = apply_transform(invert_transform(matrix), p[[0, 2, 3]])
            side = p[1].max() * view.side / size * self.ROI_SCALE
            across, down = eye_l - eye_r
            rois.append(View(centre[0], centre[1], side, math.atan2(down, across)))
        return rois

    def _upright(self, image: np.ndarray, roi: View) -> Face | None:
        """The face in a view, or None. If the mesh is unsure, it tries all quarter turns: BlazeFace may have taken a
        forehead for a mouth."""
        face = self._settle(image, roi, 0.01)
        if face.score < self.SURE_SCORE:
            turned = [self._settle(image, roi.turned(quarters), 0.01) for quarters in (1, 2, 3)]
            face = max(face, *turned, key=lambda face: face.score)
        upside_down = face.landmarks[45, 0] < face.landmarks[36, 0]
        return face if face.score >= (self.SURE_SCORE if upside_down else self.MIN_SCORE) else None

    def _roi(self, face: Face) -> View:
        """The mesh's view of a face: its box enlarged, with level eyes."""
        x0, y0, x1, y1 = face.box
        across = face.landmarks[45] - face.landmarks[36]
        side = max(x1 - x0, y1 - y0) * self.ROI_SCALE
        return View((x0 + x1) / 2, (y0 + y1) / 2, side, math.atan2(across[1], across[0]))

    def _settle(self, image: np.ndarray, roi: View, still: float) -> Face:
        """Fit the mesh again and again in the view of the last fit, until the view moves by less than `still` sides."""
        for _ in range(10):
            face = self._fit(image, roi)
            last, roi = roi, self._roi(face)
            moved = math.dist((last.x, last.y, last.side), (roi.x, roi.y, roi.side))
            if face.score < self.MIN_SCORE or moved < still * roi.side:
                break
        return face

    def _fit(self, image: np.ndarray, roi: View) -> Face:
        """The face that the mesh fits in a view."""
        matrix = roi.matrix(self.MESH_PX)
        crop = warp(image, matrix, self.MESH_PX)
        outputs = self._mesh(crop.astype(np.float32) / 255)
        vertices = outputs["conv2d_20"].reshape(468, 3)[:, :2]
        logit = float(outputs["conv2d_30"].item())
        vertices = apply_transform(invert_transform(matrix), vertices.astype(np.float64)).astype(np.float32)
        box = (*vertices.min(axis=0).tolist(), *vertices.max(axis=0).tolist())
        return Face(vertices[MESH_TO_68], 1 / (1 + math.exp(-logit)), box)


@cache
def _anchors(cells: int) -> np.ndarray:
    """The centres of BlazeFace's anchors (896 cells^2, 2) in an input of 128 x `cells` px."""
    centres = []
    for stride, per_cell in ((8, 2), (16, 6)):
        y, x = np.mgrid[: cells * 128 // stride, : cells * 128 // stride]
        grid = (np.stack([x, y], axis=-1).reshape(-1, 2) + 0.5) * stride
        centres.append(np.repeat(grid, per_cell, axis=0))
    return np.concatenate(centres)


# ---- Where to search ----

# A stage of the search: the number of BlazeFace's squares along each side of a view, and views that cover the picture.
# BlazeFace finds faces from an eighth of a square's side on, tilted by up to 55 degrees.
Stage = tuple[int, list[View]]
_SMALLEST = 0.125
_STEP = 3  # side of a stage's squares over that of the next stage
_COARSE_PX = 2048  # longest side of a picture in the first search
_FLAT = 4  # levels of 255: views of less contrast are not searched
_CELLS = 4  # most squares along a view: together they take a third of the time, as they need not overlap


def _coarse_stages(height: int, width: int) -> list[Stage]:
    """The stages of a whole picture, a whole picture with a margin (for faces that fill it), and half its side."""
    longest = max(height, width)
    shares = (1.0, 1.5, 0.5) if 0.5 * longest >= 3 * MIN_FACE_PX else (1.0, 1.5)
    return [(1, covering(height, width, share * longest, 0.5 * share * longest)) for share in shares]


def _fine_stages(height: int, width: int) -> list[Stage]:
    """Stages of ever smaller squares, down to those in which the smallest faces can be found."""
    longest, least = max(height, width), MIN_FACE_PX / _SMALLEST
    count = max(0, math.ceil(math.log(longest / 2 / least, _STEP)))
    stages = []
    for side in np.geomspace(longest / 2, least, count + 1)[1:].tolist():
        cells = min(_CELLS, math.ceil(longest / side))
        stages.append((cells, covering(height, width, cells * side, 0.5 * side)))
    return stages
