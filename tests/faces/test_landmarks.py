"""Finding faces and their landmarks: real faces, tracking, both backends, bad input."""

from __future__ import annotations

import math
import os
import sys
import types
import urllib.error
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from dheads.config import AlignmentConfig
from dheads.errors import DheadsError
from dheads.faces import alignment as faces
from dheads.faces.detection import Face, LandmarkBackend
from dheads.faces.fan import FanBackend
from dheads.faces.landmarks import find_face, load_backend
from dheads.media.photos import load_photo

# Compiling face-alignment's loops takes longer than all that is done with them here.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")

ALIGNMENT = AlignmentConfig()
BLAZEFACE = {"detector": "blazeface.pth", "anchor": "anchors.npy"}
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


def test_a_face_that_jumps_is_found_exactly_at_once(mesh: LandmarkBackend, shared: Path) -> None:
    frame = next(frames_of(shared / "data" / "talkvid" / "Age_31-45_1.mp4"))
    moved = np.pad(frame, ((0, 0), (50, 0), (0, 0)), mode="edge")[:, : frame.shape[1]]  # by half a face
    detected = mesh.detect(moved)[0].landmarks
    error = np.linalg.norm(mesh.track([frame, moved])[1] - detected, axis=-1).mean()
    assert error < 0.04 * faces.eye_distance(detected)  # a single look at the old place is off by 0.06


def test_tracking_a_still_picture_comes_to_rest(mesh: LandmarkBackend, shared: Path) -> None:
    clip = shared / "data" / "talkvid" / "Age_60_plus_1.mp4"
    frame = next(islice(frames_of(clip), 30, None))
    opening = faces.mouth_opening(mesh.track([frame] * 16))[4:]
    assert np.abs(np.diff(opening)).mean() < 0.004  # 0.012 where each look goes to the last one's own box


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


# ---- Whichever way up ----


def tilt(face: Face) -> float:
    """Of the line from eye to eye, degrees clockwise on the screen."""
    across = face.landmarks[45] - face.landmarks[36]
    return math.degrees(math.atan2(across[1], across[0]))


@pytest.mark.parametrize("quarters", [1, 2, 3])
@pytest.mark.parametrize("name", ["stills/*.jpg", "stills_us/*.jpg"])
def test_faces_turned_by_quarters_are_found_the_right_way_up(
    mesh: LandmarkBackend, shared: Path, name: str, quarters: int
) -> None:
    """Their landmarks are those of the upright photo, turned."""
    for path in sorted((shared / "data").glob(name))[1::30]:
        photo = load_photo(path)
        turned = np.ascontiguousarray(np.rot90(photo, quarters))
        back, height = mesh.detect(turned)[0].landmarks, turned.shape[0]
        for _ in range(quarters):  # np.rot90 took (x, y) to (y, width - 1 - x), and the width became the height
            back = np.stack([height - 1 - back[:, 1], back[:, 0]], axis=-1)
            height = sum(photo.shape[:2]) - height
        upright = mesh.detect(photo)[0].landmarks
        assert np.linalg.norm(back - upright, axis=-1).mean() < 0.1 * faces.eye_distance(upright), path.name


@pytest.mark.parametrize("degrees", [60, 120, 150, 195, 240, 300])
def test_faces_turned_by_any_angle(mesh: LandmarkBackend, shared: Path, degrees: int) -> None:
    for path in sorted((shared / "data" / "stills").glob("*.jpg"))[5::60]:
        turned, _ = placed(load_photo(path), degrees, 1, 400)
        off = (tilt(mesh.detect(turned)[0]) - degrees + 180) % 360 - 180
        assert abs(off) < 25, path.name


def test_no_face_is_turned_that_was_upright(mesh: LandmarkBackend, shared: Path) -> None:
    for folder in ("stills", "stills_us"):
        for path in sorted((shared / "data" / folder).glob("*.jpg"))[::25]:
            assert abs(tilt(mesh.detect(load_photo(path))[0])) < 30, path.name


def test_a_face_that_is_surely_upright_is_looked_at_one_way(
    astronaut: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = load_backend("mesh")
    angles: list[float] = []
    fit = backend._fit
    monkeypatch.setattr(backend, "_fit", lambda image, roi: angles.append(roi.angle) or fit(image, roi))
    assert len(backend.detect(astronaut)) == 1
    assert 1 <= len(angles) <= 4
    assert max(map(abs, angles)) < 0.5


def test_an_upside_down_clip_is_tracked_the_right_way_up(mesh: LandmarkBackend, shared: Path) -> None:
    frames = list(islice(frames_of(shared / "data" / "talkvid" / "Gender_male_1.mp4"), 12))
    upright, turned = mesh.track(frames), mesh.track([np.ascontiguousarray(frame[::-1, ::-1]) for frame in frames])
    back = np.array(frames[0].shape[1::-1]) - 1 - turned
    assert np.linalg.norm(back - upright, axis=-1).mean() < 0.1 * faces.eye_distance(upright[0])


# ---- Small faces in large pictures ----


def textured(height: int, width: int) -> np.ndarray:
    """A picture without a face: blots and grain of all sizes."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3), np.float32)
    for size in (3, 12, 60, 300):
        grain = rng.normal(0, math.sqrt(size), (height // size + 2, width // size + 2, 3)).astype(np.float32)
        total += cv2.resize(grain, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.clip(120 + 40 * total / total.std(), 0, 255).astype(np.uint8)


def shaded(height: int, width: int) -> np.ndarray:
    sky = np.linspace((180, 200, 230), (60, 90, 50), height)
    return np.repeat(sky[:, None], width, axis=1).astype(np.uint8)


@pytest.mark.parametrize(
    ("background", "height", "width", "face_px", "x", "y"),
    [
        (textured, 1400, 2100, 32, 1100, 620),
        (shaded, 4000, 6000, 40, 3700, 2100),
        (shaded, 1500, 12_000, 90, 8000, 700),
        (shaded, 3000, 4000, 32, 17, 2800),
    ],
)
def test_small_faces_in_large_pictures(
    mesh: LandmarkBackend,
    astronaut: np.ndarray,
    background: Callable[[int, int], np.ndarray],
    height: int,
    width: int,
    face_px: int,
    x: int,
    y: int,
) -> None:
    """As small as the message says."""
    (alone,) = mesh.detect(astronaut)
    scale = face_px / float(alone.box[2] - alone.box[0])
    small = cv2.resize(astronaut, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    picture = background(height, width)
    picture[y : y + small.shape[0], x : x + small.shape[1]] = small
    (face,) = mesh.detect(picture)
    expected = (alone.landmarks + 0.5) * scale - 0.5 + (x, y)
    distances = np.linalg.norm(face.landmarks - expected, axis=-1)
    assert distances.mean() < 0.15 * faces.eye_distance(expected)


def test_no_face_where_there_is_none(mesh: LandmarkBackend) -> None:
    assert mesh.detect(textured(900, 1200)) == []


# ---- Faces at the edge ----


@pytest.mark.parametrize(
    ("part", "whole"),
    [
        ((slice(0, 190), slice(None)), True),  # cut below the chin
        ((slice(70, None), slice(None)), True),  # the hair
        ((slice(0, 138), slice(None)), False),  # the mouth
        ((slice(100, None), slice(None)), False),  # the eyes
        ((slice(None), slice(0, 226)), False),  # one half of it
    ],
)
def test_eyes_and_mouth_must_be_in_the_picture(
    mesh: LandmarkBackend, astronaut: np.ndarray, part: tuple[slice, slice], whole: bool
) -> None:
    picture = np.ascontiguousarray(astronaut[part])
    if whole:
        find_face(picture, mesh, "a.png")
    else:
        with pytest.raises(DheadsError, match=r"a\.png: (the face is cut by the picture's edge|no face found); "):
            find_face(picture, mesh, "a.png")


def test_a_face_that_is_cut_does_not_count(mesh: LandmarkBackend, shared: Path) -> None:
    left, right = (load_photo(shared / "data" / "stills" / name) for name in ("010.jpg", "020.jpg"))
    crowd = np.full((300, 620, 3), 90, np.uint8)
    crowd[40:200, 20:180] = cv2.resize(left, (160, 160), interpolation=cv2.INTER_AREA)
    crowd[10:266, 300:556] = cv2.resize(right, (256, 256))
    face, count = find_face(np.ascontiguousarray(crowd[:, :430]), mesh, "crowd.png")
    assert count == 1
    assert face.landmarks[:, 0].max() < 200


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
    """In place of FAN and S3FD: a face is a white spot, every landmark its centre. It notes what it is asked."""

    def __init__(self, landmarks_type: int, device: str, compile: bool, max_batch_size: int) -> None:
        assert (landmarks_type, device, compile, max_batch_size) == (1, "cpu", False, FanBackend.BATCH)
        self.face_detector = self
        self.batches: list[tuple[int, ...]] = []  # (B, 3, H, W) of each batch the detector was given

    def get_landmarks_from_image(
        self, image: np.ndarray, detected_faces: list[np.ndarray] | None = None, return_bboxes: bool = False
    ) -> tuple | list[np.ndarray]:
        assert return_bboxes == (detected_faces is None)
        boxes = spots(image) if detected_faces is None else detected_faces
        if not boxes:
            return None, None, None
        points = [np.repeat([centre_of_brightness(image, box)], 68, axis=0) for box in boxes]
        return (points, None, boxes) if return_bboxes else points

    def detect_from_batch(self, batch: torch.Tensor) -> list[list[np.ndarray]]:
        assert batch.dtype == torch.uint8
        self.batches.append(tuple(batch.shape))
        return [spots(picture.movedim(0, -1).numpy()) for picture in batch]


def spots(image: np.ndarray) -> list[np.ndarray]:
    _, _, stats, _ = cv2.connectedComponentsWithStats((image[..., 0] > 200).astype(np.uint8))
    return [np.array([x, y, x + w, y + h, 0.9]) for x, y, w, h, _ in stats[1:]]


def centre_of_brightness(image: np.ndarray, box: np.ndarray) -> tuple[float, float]:
    x0, y0, x1, y1 = (round(float(v)) for v in box[:4])
    assert image[y0:y1, x0:x1].size, "the box lies beyond the picture"
    rows, columns = np.nonzero(image[y0:y1, x0:x1, 0] > 200)
    return x0 + columns.mean(), y0 + rows.mean()


def scene(*boxes: tuple[int, int, int, int], shape: tuple[int, int] = (100, 200)) -> np.ndarray:
    """A black picture with white spots at x0, y0, x1, y1."""
    image = np.zeros((*shape, 3), np.uint8)
    for x0, y0, x1, y1 in boxes:
        image[y0:y1, x0:x1] = 255
    return image


def test_fan_gives_faces_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, BrightSpots)
    backend = load_backend("fan")
    image = scene((10, 10, 20, 20), (100, 50, 140, 90))
    found = backend.detect(image)
    assert [face.box for face in found] == [(100, 50, 140, 90), (10, 10, 20, 20)]
    np.testing.assert_allclose(found[0].landmarks[5], [119.5, 69.5])
    assert found[0].landmarks.dtype == np.float32
    assert found[0].score == 0.9
    assert backend.detect(np.zeros_like(image)) == []
    with pytest.raises(DheadsError, match="no face found"):
        find_face(np.zeros_like(image), backend, "a.png")


def test_fan_tracks_in_batches_as_the_frames_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, BrightSpots)
    backend = load_backend("fan")
    taken = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal taken
        for step in range(40):
            assert step < 16 * (len(backend._net.batches) + 1)  # never more than a batch ahead
            taken += 1
            yield scene((100 + step, 40, 130 + step, 80), (10, 10, 20 + step, 20 + step))

    landmarks = backend.track(frames())
    assert taken == 40
    assert [shape[0] for shape in backend._net.batches] == [16, 16, 8]
    assert landmarks.dtype == np.float32
    # It stays with the spot that was the largest at first, across batches, though the other outgrows it.
    expected = np.stack([114.5 + np.arange(40), np.full(40, 59.5)], axis=-1)
    np.testing.assert_allclose(landmarks, np.repeat(expected[:, None], 68, axis=1), atol=1e-4)
    assert backend.track([]).shape == (0, 68, 2)


def test_fan_tracks_one_person_through_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, BrightSpots)
    nobody, person, other = scene(), scene((20, 20, 60, 60)), scene((120, 10, 190, 80))
    both = scene((20, 20, 60, 60), (120, 10, 190, 80))
    landmarks = load_backend("fan").track([nobody, person, both, other, nobody, other, both, nobody])
    assert np.isnan(landmarks).all(axis=(1, 2)).tolist() == [True, False, False, True, True, True, False, True]
    assert np.abs(landmarks[[1, 2, 6]] - 39.5).max() < 1e-4
    assert np.isnan(load_backend("fan").track([nobody] * 20)).all()


def test_fan_takes_large_frames_in_small_batches_and_shrinks_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, BrightSpots)
    backend = load_backend("fan")
    large = scene((600, 300, 1000, 700), shape=(1000, 2000))
    landmarks = backend.track([scene((10, 10, 40, 40))] * 3)
    landmarks = backend.track([large] * 2)
    assert backend._net.batches == [(3, 3, 100, 200), (1, 3, 1000, 2000), (1, 3, 1000, 2000)]
    np.testing.assert_allclose(landmarks[:, 5], [[799.5, 499.5]] * 2, atol=1e-3)
    huge = scene((1200, 600, 2000, 1400), shape=(2000, 4000))
    landmarks = backend.track([huge])
    (_, _, height, width) = backend._net.batches[-1]
    assert 0.99 * 2**21 < height * width <= 1.01 * 2**21
    np.testing.assert_allclose(landmarks[0, 5], [1599.5, 999.5], atol=4)  # in px of the whole frame


def test_fan_looks_at_large_photos_as_a_whole_and_then_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    class Coarse(BrightSpots):
        def get_landmarks_from_image(self, image: np.ndarray, **options: bool) -> tuple:
            """As S3FD, it sees nothing smaller than 16 px."""
            seen.append(image.shape[:2])
            points, _, boxes = super().get_landmarks_from_image(image, **options)
            large = [k for k, box in enumerate(boxes or []) if box[2] - box[0] >= 16]
            return [points[k] for k in large], None, [boxes[k] for k in large]

    stand_in(monkeypatch, Coarse)
    backend = load_backend("fan")
    large = scene((3000, 1500, 3600, 2100), shape=(3000, 5000))
    (face,) = backend.detect(large)
    np.testing.assert_allclose(face.landmarks[3], [3299.5, 1799.5], atol=2)
    assert len(seen) == 1
    # Of 12 px and 9 px in the whole.
    found = backend.detect(scene((3000, 1500, 3040, 1540), (60, 20, 92, 52), shape=(3000, 5000)))
    centres = sorted(face.landmarks[3].tolist() for face in found)
    np.testing.assert_allclose(centres, [[75.5, 35.5], [3019.5, 1519.5]], atol=1)
    assert max(height * width for height, width in seen) <= FanBackend.BATCH_PX
    assert 2 < len(seen) < 25


def test_fan_tracks_on_when_the_frames_change_size(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, BrightSpots)
    small, wide = scene((20, 20, 60, 60)), scene((20, 20, 60, 60), shape=(120, 300))
    landmarks = load_backend("fan").track([small, small, wide, small])
    assert np.abs(landmarks - 39.5).max() < 1e-4


def test_faces_at_the_edge_see_nothing_of_the_next_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    class WideView(BrightSpots):
        def get_landmarks_from_image(self, image: np.ndarray, detected_faces: list[np.ndarray], **_: bool) -> list:
            # As FAN, it sees more than the box: 1.2 times its side from its centre.
            wide = [np.array([x0 - 28, y0 - 28, x1 + 28, y1 + 28]).clip(0) for x0, y0, x1, y1 in detected_faces]
            return super().get_landmarks_from_image(image, wide)

    stand_in(monkeypatch, WideView)
    top, bottom = scene((60, 0, 100, 40)), scene((60, 60, 100, 100))
    landmarks = load_backend("fan").track([bottom, bottom, top, top])
    np.testing.assert_allclose(landmarks[:2, 0], [[79.5, 79.5]] * 2, atol=1e-4)
    assert np.isnan(landmarks[2:]).all()  # a jump of more than a face
    landmarks = load_backend("fan").track([scene((60, 25, 100, 65)), bottom, scene((60, 25, 100, 65)), top])
    np.testing.assert_allclose(landmarks[:, 0, 1], [44.5, 79.5, 44.5, 19.5], atol=1e-4)


# ---- The real face-alignment, as far as it goes without the downloads of its networks ----


@pytest.fixture(scope="module")
def untrained_fan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file such as the published one, of random weights, and with one hourglass in place of four."""
    models = pytest.importorskip("face_alignment.models")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fan") / "2DFAN.pth"
    torch.save(models.FAN(1).state_dict(), path)
    return path


def test_fan_agrees_with_face_alignment_s_own_batches(
    monkeypatch: pytest.MonkeyPatch, untrained_fan: Path, shared: Path
) -> None:
    api = pytest.importorskip("face_alignment.api")
    detector = {f"path_to_{kind}": str(shared / "weights" / name) for kind, name in BLAZEFACE.items()}
    if not all(Path(path).exists() for path in detector.values()):
        pytest.skip("the weights of blazeface are not there")
    monkeypatch.setitem(api.models_urls, "2DFAN-1", "")
    monkeypatch.setattr(api, "load_file_from_url", lambda _: untrained_fan)
    real = partial(api.FaceAlignment, network_size=1, face_detector="blazeface", face_detector_kwargs=detector)
    monkeypatch.setattr("face_alignment.FaceAlignment", real)
    backend = load_backend("fan")
    frames = np.stack(list(islice(frames_of(shared / "data" / "grid" / f"{DIRTY_CLIPS[0]}.mp4"), 11, 14)))
    landmarks = backend.track(frames)
    batch = torch.from_numpy(frames).movedim(-1, 1)
    with pytest.warns(UserWarning, match="No faces were detected"):
        expected, _, boxes = backend._net.get_landmarks_from_batch(batch, return_bboxes=True)
    assert [len(found) for found in boxes] == [0, 1, 1]
    assert np.isnan(landmarks[0]).all()
    assert np.array_equal(landmarks[1:], np.stack(expected[1:]).astype(np.float32))


def test_fan_reads_what_s3fd_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3FD's own reading of its network's maps; the network is one that knows a face by its brightness."""
    api = pytest.importorskip("face_alignment.api")
    sfd = pytest.importorskip("face_alignment.detection.sfd.sfd_detector")

    class Brightness(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> list[torch.Tensor]:
            maps = []
            for scale in range(6):
                bright = torch.nn.functional.avg_pool2d(batch.mean(dim=1, keepdim=True), 2 ** (scale + 2))
                face = (bright if scale == 3 else bright * 0) - 50  # anchors of 128 px, every 32 px
                maps += [torch.cat([-face, face], dim=1), face.new_zeros(len(face), 4, *face.shape[2:])]
            return maps

    class Centre(torch.nn.Module):
        """In place of FAN: every landmark is at the middle of the crop."""

        def forward(self, crops: torch.Tensor) -> torch.Tensor:
            heatmaps = crops.new_zeros(len(crops), 68, 64, 64)
            heatmaps[:, :, 31:33, 31:33] = 1
            return heatmaps

    monkeypatch.setattr(sfd, "s3fd", Brightness)
    monkeypatch.setattr(sfd, "load_state_dict_from_url", lambda _: {})
    monkeypatch.setattr(api.FaceAlignment, "_load_native", lambda *_: Centre())
    backend = load_backend("fan")
    dark = np.zeros((256, 384, 3), np.uint8)
    face = dark.copy()
    face[96:128, 192:224] = 255  # the cell whose anchor is centred on (208, 112)
    two = face.copy()
    two[192:224, 32:64] = 255
    landmarks = backend.track([dark, face, two, dark, face])
    assert np.isnan(landmarks).all(axis=(1, 2)).tolist() == [True, False, False, True, False]
    # FAN's crop is centred 0.12 of the box above its middle; whole pixels.
    assert np.abs(landmarks[[1, 2, 4]] - [208, 112 - 0.12 * 128]).max() <= 3
    assert np.isnan(backend.track([dark])).all()
    assert backend.detect(dark) == []
    tiny = np.zeros((20, 300, 3), np.uint8)  # too small for S3FD
    assert np.isnan(backend.track([tiny, tiny])).all()
    assert backend.detect(tiny) == []
    assert len(backend.detect(two)) == 2
    assert backend.detect(face)[0].box == pytest.approx((144, 48, 272, 176))


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
