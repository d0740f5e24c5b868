"""Crops pasted back into their photo: their place, the pixels that stay the same, the sizes of frames."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from dheads.config import preset
from dheads.faces import alignment as faces
from dheads.faces.landmarks import find_face, load_backend
from dheads.faces.paste import FRAME_LIMIT_PX, Paster, face_mask
from dheads.media.photos import load_photo

SIZE = 96
ALIGNMENT = preset("small").alignment
MOUTH = 0.5, 0.69  # in the crop, as shares of its side
_matrices: dict[Path, np.ndarray] = {}


def photo_and_matrix(path: Path, scale: float = 1.0, degrees: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A real photo, turned about its centre and scaled, and the transform from it to its aligned face."""
    photo = load_photo(path)
    if path not in _matrices:
        face, _ = find_face(photo, load_backend("mesh"), str(path))
        _matrices[path] = faces.align_transforms(face.landmarks[None], ALIGNMENT, SIZE)[0]
    return transformed(photo, _matrices[path], scale, degrees)


def transformed(
    photo: np.ndarray, matrix: np.ndarray, scale: float, degrees: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    height, width = photo.shape[:2]
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, scale)
    size = round(width * scale), round(height * scale)
    turn[:, 2] += (np.array(size) - (width, height)) / 2
    image = cv2.warpAffine(photo, turn, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    back = faces.invert_transform(turn)
    return image, np.column_stack([matrix[:, :2] @ back[:, :2], faces.apply_transform(matrix, back[:, 2])])


def even(photo: np.ndarray) -> np.ndarray:
    return photo[: len(photo) // 2 * 2, : photo.shape[1] // 2 * 2]


def mask_in_photo(photo: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return faces.unwarp(face_mask(ALIGNMENT, SIZE), matrix, even(photo).shape)


def blob(crop: np.ndarray, colour: tuple[int, int, int] = (120, 0, 0)) -> np.ndarray:
    """The crop with a changed mouth: a dark ellipse."""
    centre = tuple(round(share * SIZE - 0.5) for share in MOUTH)
    return cv2.ellipse(crop.copy(), (centre, (22, 12), 0), colour, -1)


@pytest.fixture
def real(examples: Path) -> tuple[np.ndarray, np.ndarray]:
    return photo_and_matrix(examples / "face.jpg")


# ---- Unchanged pixels ----


@pytest.mark.parametrize(("scale", "degrees"), [(0.3, 0), (1, 0), (1, 31), (2.37, -17), (5, 180)])
def test_an_unchanged_face_leaves_the_photo_as_it_is(examples: Path, scale: float, degrees: float) -> None:
    photo, matrix = photo_and_matrix(examples / "face.jpg", scale, degrees)
    pasted = Paster(photo, matrix, SIZE, ALIGNMENT)(faces.warp(photo, matrix, SIZE))
    np.testing.assert_array_equal(pasted, even(photo))


@pytest.mark.parametrize("name", ["010", "045", "126"])
def test_no_pixel_outside_the_mask_changes_whatever_the_crop_shows(shared: Path, name: str) -> None:
    photo, matrix = photo_and_matrix(shared / "data" / "stills" / f"{name}.jpg")
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    pasted = Paster(photo, matrix, SIZE, ALIGNMENT)(noise)
    mask = mask_in_photo(photo, matrix)
    changed = (pasted != even(photo)).any(axis=-1)
    assert not changed[mask == 0].any()
    assert changed[mask > 0.99].mean() > 0.9


def test_the_edge_is_under_two_levels_when_only_the_mouth_changes(real: tuple[np.ndarray, np.ndarray]) -> None:
    photo, matrix = real
    pasted = Paster(photo, matrix, SIZE, ALIGNMENT)(blob(faces.warp(photo, matrix, SIZE)))
    mask = mask_in_photo(photo, matrix)
    difference = np.abs(pasted.astype(int) - photo)
    assert difference.max() > 50
    assert difference[mask < 0.9].max() < 2


def test_the_mask_holds_the_face_and_leaves_the_border_free() -> None:
    for name, size in (("small", 128), ("crema", 128)):
        alignment = preset(name).alignment
        mask = face_mask(alignment, size)
        x, y = np.clip(np.rint(faces.mean_face(alignment, size)), 0, size - 1).astype(int).T
        assert mask[y, x].min() > 0.9  # at the tip of the chin, which is near the border
        assert mask[y, x][17:].min() == 1
        assert mask[:4].max() == mask[-4:].max() == mask[:, :4].max() == mask[:, -4:].max() == 0
        # From 1 to 0 over no less than a twelfth of the side; a smoothstep is 1.5 times as steep as the mean.
        assert max(np.abs(np.diff(mask, axis=axis)).max() for axis in (0, 1)) < 1.6 * 12 / size


# ---- Pixels from the crop ----


@pytest.mark.parametrize(("scale", "degrees"), [(0.4, 0), (1, 0), (1, 31), (3.1, -50)])
def test_a_changed_mouth_lies_where_the_alignment_says(examples: Path, scale: float, degrees: float) -> None:
    photo, matrix = photo_and_matrix(examples / "face.jpg", scale, degrees)
    pasted = Paster(photo, matrix, SIZE, ALIGNMENT)(blob(np.full((SIZE, SIZE, 3), 128, np.uint8), (0, 0, 0)))
    plain = Paster(photo, matrix, SIZE, ALIGNMENT)(np.full((SIZE, SIZE, 3), 128, np.uint8))
    weight = np.abs(pasted.astype(float) - plain).sum(axis=-1)
    weight[weight < 30] = 0
    y, x = np.indices(weight.shape)
    centroid = [(x * weight).sum() / weight.sum(), (y * weight).sum() / weight.sum()]
    centre = np.array([round(share * SIZE - 0.5) for share in MOUTH], float)
    expected = faces.apply_transform(faces.invert_transform(matrix), centre)
    np.testing.assert_allclose(centroid, expected, atol=1)


def test_an_open_mouth_hides_the_old_lips_and_skin_keeps_its_grain(examples: Path) -> None:
    photo, matrix = photo_and_matrix(examples / "face.jpg", 3)
    grain = np.random.default_rng(0).normal(0, 12, photo.shape[:2])[..., None]
    photo = np.clip(photo + grain, 0, 255).astype(np.uint8)
    pasted = Paster(photo, matrix, SIZE, ALIGNMENT)(blob(faces.warp(photo, matrix, SIZE), (90, 60, 60)))

    def spot(image: np.ndarray, x: float, y: float) -> np.ndarray:
        x, y = faces.apply_transform(faces.invert_transform(matrix), np.array([x, y]) * SIZE - 0.5).astype(int)
        return image[y - 8 : y + 8, x - 8 : x + 8].astype(float)

    assert spot(photo, *MOUTH).std() > 10
    np.testing.assert_allclose(spot(pasted, *MOUTH), np.broadcast_to([90, 60, 60], (16, 16, 3)), atol=1)
    np.testing.assert_array_equal(spot(pasted, 0.5, 0.25), spot(photo, 0.5, 0.25))


def test_a_colour_cast_of_the_whole_crop_is_matched_away(real: tuple[np.ndarray, np.ndarray]) -> None:
    photo, matrix = real
    paster, crop = Paster(photo, matrix, SIZE, ALIGNMENT), faces.warp(photo, matrix, SIZE)
    for cast in ([10, 10, 10], [10, -7, 3]):
        tinted = np.clip(crop.astype(int) + cast, 0, 255).astype(np.uint8)
        np.testing.assert_array_equal(paster(tinted), photo)
    # A cast does not hide motion, and motion does not look like a cast.
    mouth = blob(crop)
    lighter = np.clip(mouth.astype(int) + 10, 0, 255).astype(np.uint8)
    assert np.abs(paster(lighter).astype(int) - paster(mouth)).max() <= 11
    mask = mask_in_photo(photo, matrix)
    assert np.abs(paster(lighter).astype(int) - photo)[mask < 0.9].max() < 2


def test_a_head_that_moves_a_little_tears_nothing(real: tuple[np.ndarray, np.ndarray]) -> None:
    photo, matrix = real
    moved = faces.warp(photo, matrix + np.array([[0, 0, 2], [0, 0, 1]]), SIZE)
    pasted = Paster(photo, matrix, SIZE, ALIGNMENT)(moved).astype(float)
    # No edge is steeper than the photo's own.
    rim = (mask_in_photo(photo, matrix) < 0.5) & (mask_in_photo(photo, matrix) > 0)
    for axis in (0, 1):
        steps, own = (np.abs(np.diff(image.mean(axis=-1), axis=axis, append=0)) for image in (pasted, photo))
        own = cv2.dilate(own, np.ones((9, 9)))
        assert (steps - own)[rim].max() < 4


def test_frames_do_not_depend_on_those_before_and_share_no_memory(real: tuple[np.ndarray, np.ndarray]) -> None:
    photo, matrix = real
    paster, crop = Paster(photo, matrix, SIZE, ALIGNMENT), faces.warp(photo, matrix, SIZE)
    first = paster(blob(crop))
    kept = first.copy()
    np.testing.assert_array_equal(paster(crop), photo)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(paster(blob(crop)), kept)


# ---- Odd photos ----


@pytest.mark.parametrize("side", ["left", "top", "bottom"])
def test_a_face_partly_outside_the_photo(real: tuple[np.ndarray, np.ndarray], side: str) -> None:
    photo, matrix = real
    x, y = faces.apply_transform(faces.invert_transform(matrix), np.array([0.5, 0.6]) * SIZE).astype(int)
    part = {"left": np.s_[:, x:], "top": np.s_[y:], "bottom": np.s_[:y]}[side]
    offset = {"left": [x, 0], "top": [0, y], "bottom": [0, 0]}[side]
    cut = np.ascontiguousarray(photo[part])
    matrix = np.column_stack([matrix[:, :2], faces.apply_transform(matrix, np.array(offset))])
    paster, crop = Paster(cut, matrix, SIZE, ALIGNMENT), faces.framed(cut, matrix, SIZE)
    np.testing.assert_array_equal(paster(crop), even(cut))
    changed = (paster(255 - crop) != even(cut)).any(axis=-1)
    assert changed.any()
    assert not changed[mask_in_photo(cut, matrix) == 0].any()


def test_a_grey_photo_stays_grey(real: tuple[np.ndarray, np.ndarray]) -> None:
    photo, matrix = real
    grey = np.repeat(photo.mean(axis=-1, keepdims=True).astype(np.uint8), 3, axis=-1)
    paster, crop = Paster(grey, matrix, SIZE, ALIGNMENT), faces.warp(grey, matrix, SIZE)
    np.testing.assert_array_equal(paster(crop), grey)
    pasted = paster(blob(crop, (40, 40, 40)))
    assert (pasted != grey).any()
    np.testing.assert_array_equal(pasted, np.repeat(pasted[..., :1], 3, axis=-1))


def test_an_odd_last_row_and_column_are_cut_off(real: tuple[np.ndarray, np.ndarray]) -> None:
    photo, matrix = real
    paster = Paster(photo[:-1, :-3], matrix, SIZE, ALIGNMENT)
    assert paster.shape == (510, 508)
    crop = faces.warp(photo[:-1, :-3], matrix, SIZE)
    np.testing.assert_array_equal(paster(crop), photo[:510, :508])


@pytest.mark.parametrize(("height", "width"), [(4100, 600), (700, 5001), (3000, 3400)])
def test_a_large_photo_is_reduced_to_what_players_decode(
    real: tuple[np.ndarray, np.ndarray], height: int, width: int
) -> None:
    photo, matrix = real
    large = cv2.copyMakeBorder(photo, 0, height - 512, 0, width - 512, cv2.BORDER_REFLECT)
    paster, crop = Paster(large, matrix, SIZE, ALIGNMENT), faces.warp(large, matrix, SIZE)
    frame = paster(crop)
    assert frame.shape == (*paster.shape, 3)
    assert max(paster.shape) <= 3840
    assert np.prod(paster.shape) <= FRAME_LIMIT_PX
    np.testing.assert_allclose(paster.shape[0] / paster.shape[1], height / width, rtol=0.005)
    # The mouth lies where it does in the large photo.
    changed = np.abs(paster(blob(crop)).astype(int) - frame).sum(axis=-1).astype(float)
    changed[changed < 30] = 0
    y, x = (changed.sum(axis=axis) @ np.arange(changed.shape[1 - axis]) / changed.sum() for axis in (1, 0))
    factor = large.shape[1] / frame.shape[1]
    centre = np.array([round(share * SIZE - 0.5) for share in MOUTH], float)
    expected = faces.apply_transform(faces.invert_transform(matrix), centre)
    np.testing.assert_allclose((np.array([x, y]) + 0.5) * factor - 0.5, expected, atol=3)


def test_the_largest_side_can_be_chosen(real: tuple[np.ndarray, np.ndarray]) -> None:
    photo, matrix = real
    assert Paster(photo, matrix, SIZE, ALIGNMENT, largest_side=300).shape == (300, 300)
    assert Paster(photo, matrix, SIZE, ALIGNMENT, largest_side=1024).shape == (512, 512)
