"""The choice of a landmark detector, and of a face in a photo."""

from __future__ import annotations

import numpy as np

from dheads.errors import DheadsError
from dheads.faces.alignment import EYES, MOUTH
from dheads.faces.detection import MIN_FACE_PX, Face, LandmarkBackend
from dheads.faces.fan import FanBackend
from dheads.faces.mesh import MeshBackend


def load_backend(name: str, device: str = "cpu") -> LandmarkBackend:
    """The landmark detector `mesh` (packaged, on the CPU) or `fan` (face-alignment, which downloads its weights).

    Raises DheadsError for another name, and if `fan` or its weights are missing.
    """
    if name == "mesh":
        return MeshBackend()
    if name == "fan":
        return FanBackend(device)
    raise DheadsError(f"unknown landmark detector {name!r}; the known ones are fan, mesh")


def find_face(image: np.ndarray, backend: LandmarkBackend, name: str, which: int = 1) -> tuple[Face, int]:
    """A face of a photo (H, W, 3) uint8, and the number of its faces. which: 1 for the largest, 2 for the next.

    Faces with eyes or mouth beyond the picture's edge do not count. Raises DheadsError, which calls the photo `name`,
    if there is no such face.
    """
    found = backend.detect(image)
    faces = [face for face in found if in_view(face, image.shape)]
    if not faces:
        reason = "the face is cut by the picture's edge" if found else "no face found"
        raise DheadsError(
            f"{name}: {reason}; it takes a face at least {MIN_FACE_PX} px wide, seen from the front or half from "
            "the side, with eyes and mouth in view"
        )
    if which > len(faces):
        count = f"{len(faces)} {'face' if len(faces) == 1 else 'faces'}"
        raise DheadsError(f"{name} shows {count}, so there is no face {which}")
    return faces[which - 1], len(faces)


def in_view(face: Face, shape: tuple[int, ...]) -> bool:
    """Whether a face's eyes and mouth lie in a picture of shape (H, W, ...); landmarks beyond its edge are guesses."""
    points = face.landmarks[[*EYES[0], *EYES[1], *MOUTH]]
    return bool((points >= 0).all() and (points <= np.array(shape[1::-1]) - 1).all())
