"""Finding faces and their landmarks: real faces, tracking, both backends, bad input."""

from __future__ import annotations

import math
import sys
import types
import urllib.error
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from dheads import faces
from dheads.config import AlignmentConfig
from dheads.errors import DheadsError
from dheads.landmarks import LandmarkBackend, find_face, load_backend
from dheads.photos import load_photo

ALIGNMENT = AlignmentConfig()
DIRTY_CLIPS = ("s1_lgbf8n", "s1_lrarzn", "s1_pbwx1s", "s1_sbbh4p")


@pytest.fixture(scope="module")
def mesh() -> LandmarkBackend:
    return load_backend("mesh")


@pytest.fixture(scope="module")
def astronaut(shared: Path) -> np.ndarray:
    return load_photo(shared / "samples" / "face_astronaut.png")


def placed(image: np.ndarray, degrees: float, scale: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture turned about its centre on a gray square, and the transform that did it."""
    c, s = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    turn = np.array([[c, -s], [s, c]])
    centre = (np.array(image.shape[1::-1]) - 1) / 2
    matrix = np.column_stack([turn, (size - 1) / 2 - turn @ centre])
    canvas = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_AREA, borderValue=(96, 112, 104))
    return canvas, matrix


def frames_of(path: Path) -> Iterator[np.ndarray]:
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


# ---- Real faces ----


def test_astronaut(mesh: LandmarkBackend, astronaut: np.ndarray) -> None:
    face, count = find_face(astronaut, mesh, "astronaut.png")
    assert count == 1
    assert face.score > 0.9
    assert face.landmarks.shape == (68, 2)
    assert face.landmarks.dtype == np.float32
    # Chin, tip of the nose, outer eye corners and mouth corners, read off the enlarged photo.
    expected = [(222, 177), (223, 126), (194, 99.5), (258, 104), (203, 140), (245, 141)]
    np.testing.assert_allclose(face.landmarks[[8, 30, 36, 45, 48, 54]], expected, atol=5)
    assert faces.mouth_opening(face.landmarks) > 0.05  # she smiles with her teeth


@pytest.mark.parametrize("degrees", [20, -20, 45, -45])
def test_tilted_faces_give_the_same_crop(mesh: LandmarkBackend, astronaut: np.ndarray, degrees: float) -> None:
    tilted, matrix = placed(astronaut[40:240, 120:320], degrees, 1.5, 512)
    straight, upright = placed(astronaut[40:240, 120:320], 0, 1.5, 512)
    reference = faces.align_transforms(mesh.detect(straight)[0].landmarks[None], ALIGNMENT, 96)[0]
    found = faces.align_transforms(mesh.detect(tilted)[0].landmarks[None], ALIGNMENT, 96)[0]
    # Both crops' corners, seen in the photo and then in the first crop.
    square = np.array([(0, 0), (95, 0), (0, 95), (95, 95)], float)
    photo = faces.apply_transform(
        faces.invert_transform(matrix), faces.apply_transform(faces.invert_transform(found), square)
    )
    assert np.abs(faces.apply_transform(reference, faces.apply_transform(upright, photo)) - square).max() < 4
    difference = (
        faces.warp(tilted, found, 96)[16:80, 16:80].astype(int) - faces.warp(straight, reference, 96)[16:80, 16:80]
    )
    assert np.abs(difference).mean() < 12


@pytest.mark.parametrize(("scale", "size"), [(0.5, 1600), (4.0, 420)])
def test_small_and_frame_filling_faces(mesh: LandmarkBackend, astronaut: np.ndarray, scale: float, size: int) -> None:
    canvas, matrix = placed(astronaut[20:220, 125:325], 0, scale, size)
    face, _ = find_face(canvas, mesh, "a.png")
    expected = faces.apply_transform(matrix, mesh.detect(astronaut)[0].landmarks - [125, 20])
    distances = np.linalg.norm(face.landmarks - expected, axis=-1)
    assert distances.mean() < 0.1 * faces.eye_distance(expected)


def test_largest_of_several_first(mesh: LandmarkBackend, shared: Path) -> None:
    left, right = (load_photo(shared / "data" / "stills" / name) for name in ("010.jpg", "020.jpg"))
    crowd = np.full((300, 620, 3), 90, np.uint8)
    crowd[40:200, 20:180] = cv2.resize(left, (160, 160), interpolation=cv2.INTER_AREA)
    crowd[10:266, 300:556] = cv2.resize(right, (256, 256), interpolation=cv2.INTER_AREA)
    face, count = find_face(crowd, mesh, "crowd.png")
    assert count == 2
    assert face.landmarks[:, 0].min() > 300


@pytest.mark.parametrize("kind", ["gray", "noise", "tiny"])
def test_no_face_names_the_photo(mesh: LandmarkBackend, kind: str) -> None:
    rng = np.random.default_rng(0)
    image = {
        "gray": np.full((200, 300, 3), 128, np.uint8),
        "noise": rng.integers(0, 256, (300, 200, 3), np.uint8),
        "tiny": np.zeros((1, 1, 3), np.uint8),
    }[kind]
    with pytest.raises(DheadsError, match=r"holiday\.jpg: no face found.*32 px"):
        find_face(image, mesh, "holiday.jpg")


@pytest.mark.parametrize("name", DIRTY_CLIPS)
def test_frames_without_a_face_are_nan(mesh: LandmarkBackend, shared: Path, name: str) -> None:
    landmarks = mesh.track(islice(frames_of(shared / "data" / "grid" / f"{name}.mp4"), 9, 20))
    assert landmarks.shape == (11, 68, 2)
    assert landmarks.dtype == np.float32
    missing = np.isnan(landmarks).all(axis=(1, 2))
    assert missing.tolist() == [True] * 3 + [False] * 8
    assert np.isfinite(landmarks[3:]).all()


def test_tracking_agrees_with_detection_and_lies_still(mesh: LandmarkBackend, shared: Path) -> None:
    frames = list(islice(frames_of(shared / "data" / "hdtf" / "RD_Radio2_000.mp4"), 24))
    tracked = mesh.track(frames)
    detected = mesh.detect(frames[-1])[0].landmarks
    scale = faces.eye_distance(detected)
    assert np.linalg.norm(tracked[-1] - detected, axis=-1).mean() < 0.05 * scale
    crops = faces.align_transforms(tracked, ALIGNMENT, 96)
    aligned = np.stack([faces.apply_transform(m, points) for m, points in zip(crops, tracked, strict=True)])
    assert np.abs(aligned[:, faces.STABLE] - faces.mean_face(ALIGNMENT, 96)[faces.STABLE]).mean() < 3


def test_tracking_keeps_to_one_person(mesh: LandmarkBackend, shared: Path) -> None:
    one, other = (load_photo(shared / "data" / "stills" / name) for name in ("010.jpg", "020.jpg"))
    alone = np.full((256, 600, 3), 90, np.uint8)
    alone[28:228, 20:220] = cv2.resize(one, (200, 200), interpolation=cv2.INTER_AREA)
    joined = alone.copy()
    joined[:, 330:586] = cv2.resize(other, (256, 256), interpolation=cv2.INTER_AREA)
    hidden = joined.copy()
    hidden[:, :300] = 90
    landmarks = mesh.track(iter([alone, joined, hidden, joined]))
    assert np.isnan(landmarks[2]).all()
    assert landmarks[[0, 1, 3], :, 0].max() < 250


def test_no_frames(mesh: LandmarkBackend) -> None:
    assert mesh.track(iter([])).shape == (0, 68, 2)


# ---- Backends ----


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(DheadsError, match=r"'dlib'.*fan, mesh"):
        load_backend("dlib")


def stand_in(monkeypatch: pytest.MonkeyPatch, network: type) -> None:
    module = types.ModuleType("face_alignment")
    module.LandmarksType = types.SimpleNamespace(TWO_D=1)
    module.FaceAlignment = network
    monkeypatch.setitem(sys.modules, "face_alignment", module)


class BrightSpots:
    """In place of FAN: a face is a white spot, and two faces are known when the picture is bright."""

    def __init__(self, landmarks_type: int, device: str, compile: bool) -> None:
        assert (landmarks_type, device, compile) == (1, "cpu", False)

    def get_landmarks_from_image(self, image: np.ndarray, return_bboxes: bool) -> tuple:
        assert return_bboxes
        _, _, stats, centres = cv2.connectedComponentsWithStats((image[..., 0] > 200).astype(np.uint8))
        if len(stats) < 2:
            return None, None, None
        boxes = [np.array([x, y, x + w, y + h, 0.9]) for x, y, w, h, _ in stats[1:]]
        return [np.repeat(c[None], 68, axis=0) for c in centres[1:]], None, boxes


def test_fan_gives_faces_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, BrightSpots)
    backend = load_backend("fan")
    image = np.zeros((100, 200, 3), np.uint8)
    image[10:20, 10:20] = 255
    image[50:90, 100:140] = 255
    found = backend.detect(image)
    assert [face.box for face in found] == [(100, 50, 140, 90), (10, 10, 20, 20)]
    np.testing.assert_allclose(found[0].landmarks[5], [119.5, 69.5])
    assert found[0].landmarks.dtype == np.float32
    assert found[0].score == 0.9
    assert backend.detect(np.zeros_like(image)) == []
    with pytest.raises(DheadsError, match="no face found"):
        find_face(np.zeros_like(image), backend, "a.png")
    # Tracking stays with the spot it began with, though the other grows.
    later = image.copy()
    later[5:45, 5:45] = 255
    assert np.abs(backend.track([image, later])[:, 0] - [119.5, 69.5]).max() < 1


def test_fan_tries_the_picture_tilted(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyLevelEyes:
        """Knows two spots for eyes only where they lie on one level."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def get_landmarks_from_image(self, image: np.ndarray, return_bboxes: bool) -> tuple:
            _, _, _, centres = cv2.connectedComponentsWithStats((image[..., 0] > 128).astype(np.uint8))
            if len(centres) != 3 or abs(centres[1][1] - centres[2][1]) > 5:
                return None, None, None
            points = np.concatenate([np.repeat(c[None], 34, axis=0) for c in sorted(centres[1:], key=lambda c: c[0])])
            return [points], None, [np.array([0, 0, 9, 9, 0.8])]

    stand_in(monkeypatch, OnlyLevelEyes)
    image = np.zeros((160, 200, 3), np.uint8)
    left, right = (70, 60), (70 + round(50 * math.cos(math.radians(40))), 60 + round(50 * math.sin(math.radians(40))))
    for spot in (left, right):
        cv2.circle(image, spot, 8, (255, 255, 255), -1)
    (face,) = load_backend("fan").detect(image)
    np.testing.assert_allclose(face.landmarks[[0, 67]], [left, right], atol=1)


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value")])
def test_fan_without_its_weights(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    stand_in(monkeypatch, fail)
    with pytest.raises(DheadsError, match=r"fan cannot load its weights.*2DFAN4-11f355bf06\.pth\.tar"):
        load_backend("fan")


def test_fan_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    with pytest.raises(DheadsError, match="pip install face-alignment"):
        load_backend("fan")
