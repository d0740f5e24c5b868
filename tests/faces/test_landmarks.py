"""Finding faces and their landmarks with the packaged detector: real faces, tracking, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from dheads.config import AlignmentConfig
from dheads.errors import DheadsError
from dheads.faces import alignment as faces
from dheads.faces.detection import Face, LandmarkBackend
from dheads.faces.landmarks import find_face, load_backend
from dheads.media.photos import load_photo

ALIGNMENT = AlignmentConfig()
DIRTY_CLIPS = ("s1_lgbf8n", "s1_lrarzn", "s1_pbwx1s", "s1_sbbh4p")


@pytest.fixture(scope="module")
def mesh() -> LandmarkBackend:
    return load_backend("mesh")


@pytest.fixture(scope="module")
def astronaut(shared: Path) -> np.ndarray:
    return load_photo(shared / "samples" / "face_astronaut.png")


def placed(image: np.ndarray, degrees: float, scale: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture turned about its centre on a gray square, and the transform that turns it."""
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
    assert error < 0.04 * faces.eye_distance(detected)  # a single fit at the old place is off by 0.06


def test_tracking_a_still_picture_comes_to_rest(mesh: LandmarkBackend, shared: Path) -> None:
    clip = shared / "data" / "talkvid" / "Age_60_plus_1.mp4"
    frame = next(islice(frames_of(clip), 30, None))
    opening = faces.mouth_opening(mesh.track([frame] * 20))[8:]
    assert np.abs(np.diff(opening)).mean() < 0.004  # 0.012 if each fit takes the last one's own box


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
    """The angle of the line from eye to eye, degrees clockwise on the screen."""
    across = face.landmarks[45] - face.landmarks[36]
    return math.degrees(math.atan2(across[1], across[0]))


@pytest.mark.parametrize("name", ["stills/*.jpg", "stills_us/*.jpg"])
def test_faces_turned_by_quarters_are_found_the_right_way_up(mesh: LandmarkBackend, shared: Path, name: str) -> None:
    """The landmarks equal those of the upright photo, turned."""
    for path in sorted((shared / "data").glob(name))[1::30]:
        photo = load_photo(path)
        upright = mesh.detect(photo)[0].landmarks
        for quarters in (1, 2, 3):
            turned = np.ascontiguousarray(np.rot90(photo, quarters))
            back, height = mesh.detect(turned)[0].landmarks, turned.shape[0]
            for _ in range(quarters):  # np.rot90 took (x, y) to (y, width - 1 - x), and the width became the height
                back = np.stack([height - 1 - back[:, 1], back[:, 0]], axis=-1)
                height = sum(photo.shape[:2]) - height
            distance = np.linalg.norm(back - upright, axis=-1).mean()
            assert distance < 0.1 * faces.eye_distance(upright), (path.name, quarters)


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


def test_a_face_that_is_surely_upright_is_fitted_one_way_up(
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
    """Faces of the least size that the error message names."""
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
