"""A face's geometry: alignment, warps and measures against closed forms."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from dheads.config import AlignmentConfig
from dheads.faces import alignment as faces

ALIGNMENT = AlignmentConfig()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def similarity(scale: float, degrees: float, x: float, y: float) -> np.ndarray:
    c, s = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    return np.array([[c, -s, x], [s, c, y]])


# ---- Alignment ----


def test_mean_face_lies_where_the_recipe_says() -> None:
    mean = faces.mean_face(ALIGNMENT, 100) + 0.5  # from the crop's edge
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean[36:42].mean(axis=0), [50 - 13.5, 40], atol=1e-4)
    np.testing.assert_allclose(mean[42:48].mean(axis=0), [50 + 13.5, 40], atol=1e-4)
    np.testing.assert_allclose(mean[0, 0] + mean[16, 0], 100, atol=1e-4)  # symmetric
    assert 70 < mean[8, 1] < 100  # the chin fits


def test_transform_is_the_similarity_that_was_applied() -> None:
    mean = faces.mean_face(ALIGNMENT, 96).astype(np.float64)
    known = [similarity(1.7, 30, 40, -9), similarity(0.2, -120, 3, 500), similarity(1, 0, 0, 0)]
    landmarks = np.stack([faces.apply_transform(faces.invert_transform(m), mean) for m in known])
    for row, matrix in zip(landmarks, known, strict=True):
        np.testing.assert_allclose(faces.align_transforms(row[None], ALIGNMENT, 96)[0], matrix, atol=1e-5)


def test_transform_is_the_least_squares_one(rng: np.random.Generator) -> None:
    source = faces.mean_face(ALIGNMENT, 96) * 2 + rng.normal(0, 5, (68, 2))
    matrix = faces.align_transforms(source[None], ALIGNMENT, 96)[0]
    # The same by the normal equations of [x -y 1 0; y x 0 1] (a, b, tx, ty) = target.
    x, y = source[faces.STABLE].T
    one, zero = np.ones_like(x), np.zeros_like(x)
    equations = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    target = faces.mean_face(ALIGNMENT, 96)[faces.STABLE].T.ravel()
    a, b, tx, ty = np.linalg.lstsq(equations, target, rcond=None)[0]
    np.testing.assert_allclose(matrix, [[a, -b, tx], [b, a, ty]], atol=1e-6)


def test_a_mirrored_face_is_not_mirrored_back() -> None:
    mirrored = faces.mean_face(ALIGNMENT, 96) * [-1, 1]
    matrix = faces.align_transforms(mirrored[None], ALIGNMENT, 96)[0]
    assert np.linalg.det(matrix[:, :2]) > 0


def test_talking_does_not_move_the_crop(rng: np.random.Generator) -> None:
    quiet = np.repeat(faces.mean_face(ALIGNMENT, 96)[None], 9, axis=0)
    talking = quiet.copy()
    talking[:, 48:] += rng.normal(0, 3, (9, 20, 2))
    talking[:, 4:13, 1] += rng.normal(0, 3, (9, 9))
    np.testing.assert_array_equal(
        faces.align_transforms(talking, ALIGNMENT, 96), faces.align_transforms(quiet, ALIGNMENT, 96)
    )


def test_smoothing_keeps_steady_motion_and_removes_jitter(rng: np.random.Generator) -> None:
    mean = faces.mean_face(ALIGNMENT, 96).astype(np.float64)
    steady = mean + np.arange(60)[:, None, None] * [0.5, -0.2]
    smooth = faces.align_transforms(steady, ALIGNMENT, 96)
    raw = faces.align_transforms(steady, AlignmentConfig(smooth_frames=0.0), 96)
    np.testing.assert_allclose(smooth[10:-10], raw[10:-10], atol=1e-9)
    shaken = np.repeat(mean[None], 60, axis=0) + rng.normal(0, 1, (60, 1, 2))
    jitter = [
        np.diff(faces.align_transforms(shaken, AlignmentConfig(smooth_frames=sigma), 96)[:, :, 2], axis=0).std()
        for sigma in (0.0, 2.0)
    ]
    assert jitter[1] < 0.2 * jitter[0]


def test_smoothing_is_the_renormalised_gaussian() -> None:
    mean = faces.mean_face(ALIGNMENT, 96).astype(np.float64)
    x = np.array([0.0, 7.0, np.nan, 1.0])
    matrices = faces.align_transforms(mean + x[:, None, None] * [1, 0], ALIGNMENT, 96)
    weight = np.exp(-0.5 * (np.arange(4)[:, None] - np.arange(4)) ** 2 / 2.0**2) * np.isfinite(x)
    expected = -(weight @ np.nan_to_num(x)) / weight.sum(axis=1)
    np.testing.assert_allclose(matrices[[0, 1, 3], 0, 2], expected[[0, 1, 3]], atol=1e-6)
    assert np.isnan(matrices[2]).all()


@pytest.mark.filterwarnings("error")
def test_frames_without_a_face_have_no_transform() -> None:
    assert np.isnan(faces.align_transforms(np.full((3, 68, 2), np.nan), ALIGNMENT, 96)).all()
    assert faces.align_transforms(np.empty((0, 68, 2)), ALIGNMENT, 96).shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("values", "max_gap", "expected"),
    [
        ("0 . . 3 4", 2, "0 1 2 3 4"),
        ("0 . . 3 4", 1, "0 . . 3 4"),
        (". . 5 . 7 .", 2, "5 5 5 6 7 7"),
        (". . 5 . 7 .", 1, ". . 5 6 7 7"),
        ("1 . . . 5 . 6", 2, "1 . . . 5 5.5 6"),
        (". . .", 9, ". . ."),
        ("2", 9, "2"),
    ],
)
def test_fill_gaps(values: str, max_gap: int, expected: str) -> None:
    def rows(text: str) -> np.ndarray:
        numbers = [math.nan if word == "." else float(word) for word in text.split()]
        return np.broadcast_to(np.array(numbers, np.float32)[:, None, None], (len(numbers), 68, 2))

    filled = faces.fill_gaps(rows(values), max_gap)
    np.testing.assert_array_equal(filled, rows(expected))
    assert filled.dtype == np.float32


# ---- Warping ----


def test_invert_transform(rng: np.random.Generator) -> None:
    matrix = similarity(0.3, 70, 12, -5)
    points = rng.normal(0, 50, (4, 68, 2))
    there = faces.apply_transform(matrix, points)
    np.testing.assert_allclose(faces.apply_transform(faces.invert_transform(matrix), there), points, atol=1e-9)
    np.testing.assert_allclose(there[1, 2], matrix @ [*points[1, 2], 1])


def test_scaled_pictures_keep_their_top_left_edge(rng: np.random.Generator) -> None:
    points = rng.normal(50, 20, (4, 2))
    assert faces.scale_points(np.array([-0.5, -0.5]), 3).tolist() == [-0.5, -0.5]
    np.testing.assert_allclose(faces.scale_points(faces.scale_points(points, 4), 0.25), points)
    matrix, corner, factor = similarity(0.7, 20, 3, 5), np.array([7, 2]), np.array([2.0, 4.0])
    in_picture = faces.scale_points(points, factor) + corner
    part = faces.transform_of_part(matrix, corner, factor)
    np.testing.assert_allclose(faces.apply_transform(part, points), faces.apply_transform(matrix, in_picture))


def test_warp_repeats_the_edge(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (20, 30, 3), np.uint8)
    np.testing.assert_array_equal(faces.warp(image, similarity(1, 0, 0, 0), 20), image[:, :20])
    crop = faces.warp(image, similarity(1, 0, 5, 3), 40)
    np.testing.assert_array_equal(crop, np.pad(image, ((3, 17), (5, 5), (0, 0)), mode="edge"))


def test_a_crop_to_be_shown_is_the_same_within_the_picture(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (200, 300, 3), np.uint8)
    inside, across = similarity(0.9, 20, -69, -99), similarity(0.9, 20, 20, 10)
    np.testing.assert_array_equal(faces.framed(image, inside, 64), faces.warp(image, inside, 64))
    beyond = faces.beyond_edge(image.shape, across, 64)
    assert 0.2 < (beyond > 0).mean() < 0.9
    crop = faces.framed(image, across, 64)
    np.testing.assert_array_equal(crop[beyond == 0], faces.warp(image, across, 64)[beyond == 0])


def test_how_far_a_crop_reaches_beyond_the_picture() -> None:
    beyond = faces.beyond_edge((10, 20, 3), similarity(2, 0, 8, 6), 64)
    # The picture lies on columns 7.5 to 46.5 of the crop and on rows 5.5 to 24.5 of it, lengths from centres.
    assert beyond[10, 20] == 0
    assert beyond[10, 3] == pytest.approx(4)  # x = -2.5 of the picture, whose edge is at -0.5
    assert beyond[31, 60] == pytest.approx(math.hypot(6, 13))
    assert beyond.dtype == np.float32
    turned = faces.beyond_edge((10, 20, 3), similarity(2, 90, 40, 10), 64)
    assert (turned > 0).mean() == pytest.approx(1 - 20 * 40 / 64**2, abs=0.02)


def test_what_lies_beyond_the_picture_has_no_streaks(rng: np.random.Generator) -> None:
    """Stripes that end at the picture's edge fade smoothly into their mean."""
    stripes = np.repeat(np.tile([40, 200], 64)[None, :, None], 60, axis=0).repeat(3, axis=-1).astype(np.uint8)
    crop = faces.framed(stripes, similarity(1, 0, 0, 0), 128).astype(float)
    assert crop[:60].std() > 70
    assert crop[80:].std() < 4
    assert np.abs(crop[80:] - 120).mean() < 3
    spread = crop[58:80, :, 0].std(axis=1)
    assert (np.diff(spread) < 1).all()
    assert (faces.warp(stripes, similarity(1, 0, 0, 0), 128)[80:].std()) > 70


@pytest.mark.parametrize("scale", [2.0, 1.0, 0.7, 0.5, 0.31, 0.08])
@pytest.mark.parametrize("degrees", [0, 33])
def test_warp_puts_every_point_in_its_place(scale: float, degrees: float) -> None:
    # A ramp stays a ramp under any filter, so each pixel has the value of the point that it shows.
    y, x = np.mgrid[:600, :600]
    ramp = np.repeat(((x + y) * 0.2).round().astype(np.uint8)[..., None], 3, axis=-1)
    matrix = similarity(scale, degrees, 0, 0)
    matrix[:, 2] = 23.5 - matrix[:, :2] @ [299.3, 301.6]
    crop = faces.warp(ramp, matrix, 48)[8:40, 8:40, 0]
    grid = np.stack(np.meshgrid(np.arange(8, 40), np.arange(8, 40)), axis=-1)
    source = faces.apply_transform(faces.invert_transform(matrix), grid)
    inside = ((source > 20) & (source < 579)).all(axis=-1)
    assert inside.mean() > 0.5
    assert np.abs(crop - source.sum(axis=-1) * 0.2)[inside].max() < 1.2


def test_a_small_part_of_a_large_picture_costs_little(rng: np.random.Generator) -> None:
    """It is cut out before it is blurred, with the same result as from a picture of that part alone."""
    large = np.zeros((3000, 4000, 3), np.uint8)
    part = cv2.GaussianBlur(rng.integers(0, 256, (200, 200, 3), np.uint8), (0, 0), 2)
    large[1500:1700, 2000:2200] = part
    for scale in (0.8, 0.6, 0.4):
        matrix = similarity(scale, 10, 0, 0)
        matrix[:, 2] = 31.5 - matrix[:, :2] @ [2100, 1600]
        alone = np.column_stack([matrix[:, :2], faces.apply_transform(matrix, np.array([2000.0, 1500.0]))])
        difference = faces.warp(large, matrix, 64).astype(int) - faces.warp(part, alone, 64)
        assert np.abs(difference).max() <= 3


@pytest.mark.parametrize("scale", [0.5, 0.4, 0.26, 0.1])
def test_shrinking_averages(scale: float) -> None:
    board = np.indices((400, 400)).sum(axis=0) % 2 * 255
    crop = faces.warp(np.repeat(board[..., None], 3, axis=-1).astype(np.uint8), similarity(scale, 7, 1.3, 0.7), 32)
    assert np.abs(crop.astype(int) - 127.5).max() < 26


def test_unwarp_puts_the_crop_back() -> None:
    y, x = np.mgrid[:120, :160]
    image = np.stack([x, y * 2, 255 - x], axis=-1).astype(np.uint8)
    matrix = faces.invert_transform(similarity(0.8, 15, 50, 20))
    back = faces.unwarp(faces.warp(image, matrix, 64), matrix, image.shape)
    assert back.shape == image.shape
    place = faces.unwarp(np.full((64, 64, 3), 255, np.uint8), matrix, image.shape)
    inside = cv2.erode(place, np.ones((5, 5))) == 255
    assert inside.mean() > 0.05
    assert np.abs(back.astype(int) - image)[inside].max() <= 3
    assert (back[cv2.dilate(place, np.ones((3, 3))) == 0] == 0).all()


# ---- Measures ----


def test_mouth_box_is_the_papers() -> None:
    landmarks = np.zeros((68, 2))
    landmarks[48:] = [60, 90]
    landmarks[48], landmarks[54], landmarks[51], landmarks[57] = (50, 90), (75.5, 90), (60, 80.25), (60, 99)
    assert faces.mouth_box(landmarks, 128).tolist() == [45, 75, 82, 105]  # pixels 45..81 and 75..104
    boxes = faces.mouth_box(np.stack([landmarks, landmarks + 40, landmarks - 300, landmarks + 300]), 128)
    assert boxes[1].tolist() == [85, 115, 122, 128]
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert boxes.min() >= 0
    assert boxes.max() <= 128


def made_face(opening: float) -> np.ndarray:
    """Eyes 100 px apart and 40 px wide, a mouth 60 px wide with lips of 10 px each."""
    points = np.zeros((68, 2))
    for start, x in ((36, -50), (42, 50)):
        points[start : start + 6] = [(x - 20, 0), (x - 8, -6), (x + 8, -6), (x + 20, 0), (x + 8, 6), (x - 8, 6)]
    points[48], points[54] = (-30, 100), (30, 100)
    for i, x in enumerate((-10, 0, 10)):
        points[50 + i], points[58 - i] = (x, 90 - opening / 2), (x, 110 + opening / 2)
        points[61 + i], points[67 - i] = (x, 100 - opening / 2), (x, 100 + opening / 2)
    return points


def test_measures() -> None:
    shapes = np.stack([made_face(0), made_face(20), made_face(-4)])
    turned = faces.apply_transform(similarity(0.37, 140, 5, 9), shapes)
    for landmarks in (shapes, turned):
        np.testing.assert_allclose(faces.mouth_opening(landmarks), [0, 0.2, -0.04], atol=1e-9)
        np.testing.assert_allclose(faces.mouth_width(landmarks), [0.6] * 3)
        np.testing.assert_allclose(faces.lip_thickness(landmarks), [0.2] * 3)
    np.testing.assert_allclose(faces.eye_distance(turned), [37] * 3)
    assert faces.mouth_opening(shapes[0]).shape == ()
    assert faces.mouth_width(shapes.reshape(1, 3, 68, 2)).shape == (1, 3)
