"""Frames composed of layers and the photo: which pixels they show, at any size, and in the whole photo."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from dheads.config import preset
from dheads.faces import alignment as faces
from dheads.faces.composition import Outline, PastedComposition, crop_composition
from dheads.faces.landmarks import find_face, load_backend
from dheads.media.photos import load_photo

SIZE, LAYER = 128, 256
ALIGNMENT = preset("small").alignment


@pytest.fixture(scope="module")
def real(examples: Path) -> tuple[np.ndarray, np.ndarray]:
    """A real photo with even sides, and the transform from it to its aligned face."""
    photo = load_photo(examples / "face.jpg")
    face, _ = find_face(photo, load_backend("mesh"), "face.jpg")
    return photo[:512, :512], faces.align_transforms(face.landmarks[None], ALIGNMENT, SIZE)[0]


def layers_of(
    own: float = 0, in_place: float = 0, offset: tuple[float, float] = (0, 0), level: float = 0
) -> np.ndarray:
    """The same everywhere: what is drawn is gray of that level."""
    values = [own * level] * 3 + [own, in_place, *offset]
    return np.broadcast_to(np.float32(values), (LAYER, LAYER, 7))


@pytest.mark.parametrize("side", [256, 300, 512])
def test_a_head_at_rest_is_the_photo(real: tuple[np.ndarray, np.ndarray], side: int) -> None:
    photo, matrix = real
    crop = faces.framed(photo, faces.scaled_transform(matrix, side / SIZE), side)
    compose = crop_composition(photo, matrix, SIZE, side)
    for in_place in (0.0, 0.4, 1.0):
        frame = compose(layers_of(in_place=in_place))
        assert frame.dtype == np.uint8
        assert np.abs(frame.astype(int) - crop).max() <= 1


def test_what_is_drawn_covers_the_photo(real: tuple[np.ndarray, np.ndarray]) -> None:
    compose = crop_composition(*real, SIZE, 300)
    assert np.abs(compose(layers_of(own=1, level=93)).astype(int) - 93).max() <= 1
    half = compose(layers_of(own=0.5, level=93)).astype(float)
    assert np.abs(half - (compose(layers_of()) / 2 + 93 / 2)).max() <= 1.5


def test_the_photo_is_moved_by_the_offset_and_comes_from_beyond_the_crop(real: tuple[np.ndarray, np.ndarray]) -> None:
    photo, matrix = real
    frame = crop_composition(photo, matrix, SIZE, 256)(layers_of(offset=(-2 * 20 / 256, 2 * 9 / 256)))
    larger = faces.scaled_transform(matrix, 256 / SIZE)
    larger[:, 2] += (20, -9)  # what is seen is 20 px to the right, 9 up
    assert np.abs(frame.astype(int) - faces.framed(photo, larger, 256)).max() <= 2


def test_in_the_whole_photo_only_the_surroundings_of_the_face_move(real: tuple[np.ndarray, np.ndarray]) -> None:
    photo, matrix = real
    paste = PastedComposition(photo, matrix, SIZE, ALIGNMENT)
    np.testing.assert_array_equal(paste(layers_of()), photo)
    moved = paste(layers_of(offset=(-2 * 6 / 256, 0)))  # 6 px of the crop's 256, 3.4 of the photo
    x, y = faces.apply_transform(faces.invert_transform(matrix), np.array([64.0, 64.0])).round().astype(int)
    step = 6 / 2 / faces.scale_of(matrix)
    shift = np.float32([[1, 0, step], [0, 1, 0]])
    wanted = cv2.warpAffine(photo, shift, photo.shape[1::-1], flags=cv2.INTER_CUBIC)
    inner = slice(y - 12, y + 12), slice(x - 12, x + 12)
    assert np.abs(moved[inner].astype(int) - wanted[inner]).mean() < 2
    reach = round(1.6 * SIZE / 2 / faces.scale_of(matrix)) + 30
    away = np.ones(photo.shape[:2], bool)
    away[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach] = False
    assert away.mean() > 0.3
    np.testing.assert_array_equal(moved[away], photo[away])


def test_what_is_drawn_has_no_edge_in_the_photo(real: tuple[np.ndarray, np.ndarray]) -> None:
    """A gray face on a gray photo: no pixel steps by more than the mask's slope."""
    photo, matrix = real
    gray = np.full_like(photo, 100)
    frame = PastedComposition(gray, matrix, SIZE, ALIGNMENT)(layers_of(own=1, level=160)).astype(int)
    assert frame.max() == 160
    assert max(np.abs(np.diff(frame, axis=axis)).max() for axis in (0, 1)) <= 16


def test_a_large_photo_is_reduced_and_an_odd_one_cut(real: tuple[np.ndarray, np.ndarray]) -> None:
    photo, matrix = real
    assert PastedComposition(photo[:-1, :-3], matrix, SIZE, ALIGNMENT).shape == (510, 508)
    large = cv2.resize(photo, (5000, 5000))
    bigger = np.column_stack([matrix[:, :2] * 512 / 5000, matrix[:, 2]])
    assert PastedComposition(large, bigger, SIZE, ALIGNMENT).shape == (3050, 3050)
    assert PastedComposition(large, bigger, SIZE, ALIGNMENT, 8192).shape == (5000, 5000)
    assert PastedComposition(large, bigger, SIZE, ALIGNMENT, 300).shape == (300, 300)


def test_what_is_drawn_ends_at_the_outline_of_the_face(examples: Path) -> None:
    """The outline moves as the photo does; below the chin there is room for a mouth that opens."""
    photo = load_photo(examples / "face.jpg")
    face, _ = find_face(photo, load_backend("mesh"), "face.jpg")
    matrix = faces.align_transforms(face.landmarks[None], ALIGNMENT, SIZE)[0]
    points = faces.apply_transform(faces.scaled_transform(matrix, LAYER / SIZE), face.landmarks)
    outlined = Outline(points, ALIGNMENT, LAYER)
    eyes = ALIGNMENT.eye_distance * LAYER

    def shown(right: float, down: float, offset: tuple[float, float] = (0, 0)) -> np.ndarray:
        column, row = round(right), round(down)
        layers = layers_of(own=1, level=93, offset=offset)
        drawn = outlined(layers)
        np.testing.assert_array_equal(drawn[..., 4:], layers[..., 4:])
        return drawn[row, column, :4]

    whole, nothing = np.float32([93, 93, 93, 1]), np.zeros(4, np.float32)
    mouth, chin, cheek = points[48:68].mean(axis=0), points[8], points[2]
    np.testing.assert_array_equal(shown(*mouth), whole)
    np.testing.assert_array_equal(shown(*chin), whole)
    np.testing.assert_array_equal(shown(chin[0], chin[1] + 0.25 * eyes), nothing)
    beside = cheek - (0.05 * eyes, 0)
    np.testing.assert_array_equal(shown(*beside), nothing)
    px = 0.25 * eyes  # a photo moved to the left by this shows the cheek there
    np.testing.assert_array_equal(shown(*beside, offset=(px / (LAYER / 2), 0)), whole)
