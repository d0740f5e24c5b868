"""Photos: orientation, colour modes, size, bad input."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, features

from dheads.errors import DheadsError
from dheads.photos import load_photo


def corners(image: np.ndarray) -> list[str]:
    names = {(255, 0, 0): "red", (0, 255, 0): "green", (0, 0, 255): "blue", (255, 255, 255): "white"}
    return [names[tuple(image[y, x].tolist())] for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1))]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_shows_the_photo_upright(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10, :15], upright[:10, 15:], upright[10:, :15], upright[10:, 15:] = (
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
    )
    # How a camera stores the picture for each value of the tag.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    photo = load_photo(tmp_path / "a.png")
    assert photo.shape == (20, 30, 3)
    assert corners(photo) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (100, 255), (100, 100, 100)),
        ("I;16", 128 * 257, (128, 128, 128)),
        ("I;16", 200, (1, 1, 1)),  # dark, not 8 bits
    ],
)
def test_png_modes(tmp_path: Path, mode: str, pixel: object, expected: tuple[int, ...]) -> None:
    Image.new(mode, (6, 4), pixel).save(tmp_path / "a.png")
    photo = load_photo(tmp_path / "a.png")
    assert photo.shape == (4, 6, 3)
    assert photo.dtype == np.uint8
    assert (photo == expected).all()


def test_palette_with_transparency(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([9, 9, 9, 200, 100, 50])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "a.png", transparency=0)
    photo = load_photo(tmp_path / "a.png")
    assert photo[0, 0].tolist() == [255, 255, 255]
    assert photo[1, 1].tolist() == [200, 100, 50]


def test_sixteen_bit_colour_is_scaled(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((4, 4, 3), (10 * 257, 128 * 257, 250 * 257), np.uint16))
    assert np.abs(load_photo(tmp_path / "a.png").astype(int) - (250, 128, 10)).max() <= 1


@pytest.mark.parametrize(("value", "expected"), [(0.5, 128), (128.0, 128), (32896.0, 128)])
def test_float_tiff_is_scaled(tmp_path: Path, value: float, expected: int) -> None:
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "a.tiff")
    assert (load_photo(tmp_path / "a.tiff") == expected).all()


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, green, blue = load_photo(tmp_path / "a.jpg")[8, 8].tolist()
    assert red > 220
    assert max(green, blue) < 40


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_large_photos_are_reduced(tmp_path: Path, name: str) -> None:
    stripes = np.zeros((1500, 6000), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(tmp_path / name)
    photo = load_photo(tmp_path / name)
    assert photo.shape == (1024, 4096, 3)
    assert abs(photo.mean() - 100) < 2  # a filter, not every other pixel


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "not a photo"),
        (b"Dear reader, this is text.\n" * 9, "not a photo"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a photo"),
        (png_header(30_000, 30_000), "200 megapixels"),
        (png_header(20_100, 20_100), "200 megapixels"),
        (png_header(64, 64), "damaged"),
    ],
)
def test_bad_photos_are_one_sentence(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "portrait.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DheadsError, match=reason) as error:
        load_photo(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_avif_photos(tmp_path: Path) -> None:
    if not features.check("avif"):
        pytest.skip("this build of Pillow knows no AVIF")
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "a.avif", quality=90)
    assert np.abs(load_photo(tmp_path / "a.avif").astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"heix"])
def test_heic_photos_are_to_be_converted(tmp_path: Path, brand: bytes) -> None:
    (tmp_path / "a.heic").write_bytes(struct.pack(">I4s4sI", 24, b"ftyp", brand, 0) + b"mif1heic" + bytes(500))
    with pytest.raises(DheadsError, match="a HEIC or AVIF photo, which cannot be read here; convert it to JPEG or PNG"):
        load_photo(tmp_path / "a.heic")


def test_folder_as_photo(tmp_path: Path) -> None:
    with pytest.raises(DheadsError, match="is a folder"):
        load_photo(tmp_path)


def test_truncated_photo(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "a.jpg"
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(DheadsError, match="damaged"):
        load_photo(path)


def test_the_photo_limit_is_not_left_behind(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DheadsError):
        load_photo(tmp_path / "absent.png")
    assert before == Image.MAX_IMAGE_PIXELS


def test_any_error_of_a_reader_is_a_damaged_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's readers raise RuntimeError for AVIF, MemoryError for JPEG 2000, and more."""
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(path)
    for error in (RuntimeError("Failed to decode image"), MemoryError(), struct.error("unpack")):

        def fails(*given: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "load", fails)
        with pytest.raises(DheadsError, match=r"a\.png: the photo is damaged \(\w"):
            load_photo(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(DheadsError, match=r"a\.jpg: is a pipe or a device"):
        load_photo(tmp_path / "a.jpg")


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to(tmp_path / "a.jpg")
    with pytest.raises(DheadsError, match=r"a\.jpg: cannot be read \(Too many levels") as error:
        load_photo(tmp_path / "a.jpg")
    assert str(error.value).count("a.jpg") == 1


def test_large_photos_of_16_bits_keep_their_gray(tmp_path: Path) -> None:
    """They are reduced before they are converted, so that memory holds them."""
    values = np.full((200, 5000), 30_000, np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    photo = load_photo(tmp_path / "a.png")
    assert photo.shape == (164, 4096, 3)
    assert set(np.unique(photo)) == {round(30_000 / 65535 * 255)}


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(DheadsError, match=r"cannot be read \(File name too long\)"):
        load_photo(tmp_path / ("x" * 300))
