"""The paper's landmark detector: FAN and S3FD of the package face-alignment."""

from __future__ import annotations

import dataclasses
import math
import pickle
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice

import cv2
import numpy as np
import torch

from dheads.errors import DheadsError
from dheads.faces.alignment import invert_transform, warp
from dheads.faces.detection import (
    MIN_FACE_PX,
    UNSEEN,
    Face,
    LandmarkBackend,
    View,
    area,
    covering,
    distinct,
    moved,
    same_person,
)


class FanBackend(LandmarkBackend):
    """FAN (Bulat and Tzimiropoulos 2017) with the face detector S3FD.

    The constructor raises DheadsError if the package or its weights are missing.
    """

    BATCH = 16  # most frames in a batch
    BATCH_PX = 2**21  # most pixels in a batch, for which S3FD takes 1.5 GB; larger frames are reduced for it

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
        height, width = image.shape[:2]
        longest, largest = max(height, width), math.isqrt(self.BATCH_PX)
        (whole,) = covering(height, width, 1.5 * longest, 0)
        stages = [[dataclasses.replace(whole, angle=math.radians(degrees))] for degrees in (-40, 40)]
        if longest <= largest:
            if faces := self._detect(image):
                return faces
        else:
            stages = [covering(height, width, longest, 0), covering(height, width, largest, largest / 4), *stages]
        for views in stages:  # turned, because S3FD and FAN are trained on nearly upright faces
            if faces := [face for view in views for face in self._seen(image, view, largest)]:
                return sorted(distinct(faces), key=area, reverse=True)
        return []

    def _seen(self, image: np.ndarray, view: View, largest: int) -> list[Face]:
        """The faces in a view, which is reduced to at most `largest` px."""
        matrix = view.matrix(size := min(round(view.side), largest))
        return [moved(face, invert_transform(matrix)) for face in self._detect(warp(image, matrix, size))]

    def track(self, frames: Iterable[np.ndarray]) -> np.ndarray:
        last: Face | None = None
        rows = [np.empty((0, 68, 2), np.float32)]
        for batch in _batches(frames, self.BATCH, self.BATCH_PX):
            person = []
            for faces in self._boxes(batch):
                person.append(same_person(faces, last))
                last = person[-1] or last
            rows.append(self._fit(batch, person))
        return np.concatenate(rows)

    def _boxes(self, frames: np.ndarray) -> list[list[Face]]:
        """The faces that S3FD finds in each of the frames (B, H, W, 3), without landmarks."""
        height, width = frames.shape[1:3]
        if min(height, width) < MIN_FACE_PX:  # S3FD fails on the empty maps of smaller frames
            return [[] for _ in frames]
        scale = min(1, math.sqrt(self.BATCH_PX / (height * width)))
        if scale < 1:
            size = round(width * scale), round(height * scale)
            frames = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
        found = self._net.face_detector.detect_from_batch(torch.from_numpy(frames).movedim(-1, 1))
        return [[Face(UNSEEN, float(box[4]), _corners(box, scale)) for box in boxes] for boxes in found]

    def _fit(self, frames: np.ndarray, person: list[Face | None]) -> np.ndarray:
        """Landmarks (B, 68, 2) of one face in each of the frames (B, H, W, 3); NaN where there is none."""
        landmarks = np.repeat(UNSEEN[None], len(frames), axis=0)
        seen = [index for index, face in enumerate(person) if face]
        if not seen:
            return landmarks
        # face-alignment runs FAN on many faces at once only if they are in one picture, so the frames become one tall
        # picture. The bands between them are black, like FAN's padding beyond a picture's edge.
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
            Face(np.asarray(p, np.float32)[:, :2], float(box[4]), _corners(box))
            for p, box in zip(points, boxes, strict=True)
        ]
        return sorted(faces, key=area, reverse=True)


def _corners(box: Sequence[float], scale: float = 1.0) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 px of a box of S3FD in a picture made `scale` times as large, in the original picture."""
    x0, y0, x1, y1 = (float(value) / scale for value in box[:4])
    return x0, y0, x1, y1


def _batches(frames: Iterable[np.ndarray], count: int, pixels: int) -> Iterator[np.ndarray]:
    """Batches (B, H, W, 3) of successive frames of one shape, at most `count` frames and `pixels` in all."""
    for (height, width, _), group in groupby(frames, key=np.shape):
        while batch := list(islice(group, max(1, min(count, pixels // (height * width))))):
            yield np.stack(batch)
