"""Photos: orientation, colour modes, size, bad input."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile, features
from pillow_heif import from_pillow

from dheads.errors import DheadsError
from dheads.media.photos import NotAPhoto, load_photo, open_animation


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
        ("I;16", 200, (1, 1, 1)),  # dark: 16 bits are not taken for 8
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
def test_large_photos_keep_their_pixels(tmp_path: Path, name: str) -> None:
    rows = np.tile(np.repeat(np.arange(1500, dtype=np.uint8)[:, None] // 8, 8, axis=1), 750)  # 6000 x 1500
    Image.fromarray(rows).save(tmp_path / name)
    photo = load_photo(tmp_path / name)
    assert photo.shape == (1500, 6000, 3)
    assert np.abs(photo.astype(int) - rows[..., None]).max() <= 1


def png_file(width: int, height: int, rows: bytes, interlace: int = 0) -> bytes:
    """8-bit RGB; rows: each after the number of its filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlace)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def png_header(width: int, height: int) -> bytes:
    return png_file(width, height, b"")


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
def test_damaged_heic_photos(tmp_path: Path, brand: bytes) -> None:
    (tmp_path / "a.heic").write_bytes(struct.pack(">I4s4sI", 24, b"ftyp", brand, 0) + b"mif1heic" + bytes(500))
    with pytest.raises(DheadsError, match=r"a\.heic: the photo is damaged \(\w"):
        load_photo(tmp_path / "a.heic")


def test_folder_as_photo(tmp_path: Path) -> None:
    with pytest.raises(DheadsError, match="is a folder"):
        load_photo(tmp_path)


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


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(DheadsError, match=r"cannot be read \(File name too long\)"):
        load_photo(tmp_path / ("x" * 300))


def test_a_path_may_be_text(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), (1, 2, 3)).save(tmp_path / "a.png")
    assert (load_photo(str(tmp_path / "a.png")) == (1, 2, 3)).all()
    with pytest.raises(DheadsError, match="no such file"):
        load_photo(str(tmp_path / "absent.png"))


@pytest.mark.parametrize("limit", [1, None])
def test_pillows_global_limits_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Pillow's global limits are neither changed nor applied."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    before = dict(vars(Image)), dict(vars(ImageFile)), dict(Image.OPEN), list(warnings.filters)
    (tmp_path / "bomb.png").write_bytes(png_header(20_000, 20_000))
    Image.new("RGB", (64, 48), (1, 2, 3)).save(tmp_path / "a.png")
    from_pillow(Image.new("RGB", (64, 48))).save(tmp_path / "a.heic")
    assert load_photo(tmp_path / "a.png").shape == load_photo(tmp_path / "a.heic").shape == (48, 64, 3)
    with pytest.raises(DheadsError, match="200 megapixels"):
        load_photo(tmp_path / "bomb.png")
    assert (dict(vars(Image)), dict(vars(ImageFile)), dict(Image.OPEN), list(warnings.filters)) == before


# --- Files that are cut short


def noise(width: int = 96, height: int = 200) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {"quality": 90}),
        ("b.jpg", {"quality": 90, "subsampling": 0}),
        ("c.jpg", {"quality": 90, "restart_marker_rows": 1}),
        ("d.png", {}),
    ],
)
def test_a_photo_that_is_cut_short_gives_its_first_rows(tmp_path: Path, name: str, options: dict) -> None:
    path = tmp_path / name
    noise().save(path, **options)
    whole = load_photo(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    notes: list[str] = []
    part = load_photo(path, notes)
    assert 80 <= len(part) <= 140
    # The chroma of a JPEG's last row is interpolated from the rows above only.
    assert np.abs(part[:-1].astype(int) - whole[: len(part) - 1]).max() <= 2
    assert notes == [f"{path} is cut short: {1 - len(part) / 200:.0%} of the picture are missing"]


def test_a_turned_photo_that_is_cut_short(tmp_path: Path) -> None:
    """The last rows as stored are missing: here the left columns."""
    exif = Image.Exif()
    exif[274] = 6
    noise().save(tmp_path / "a.jpg", quality=90, exif=exif)
    whole = load_photo(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) * 6 // 10])
    part = load_photo(tmp_path / "a.jpg")
    assert (whole.shape, len(part)) == ((96, 200, 3), 96)
    assert np.abs(part[:, 1:].astype(int) - whole[:, -part.shape[1] + 1 :]).max() <= 2


def test_a_progressive_photo_that_is_cut_short_lacks_detail(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.jpg", quality=90, progressive=True)
    whole, data = load_photo(tmp_path / "a.jpg"), (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) * 9 // 10])
    part = load_photo(tmp_path / "a.jpg")
    assert part.shape == whole.shape
    assert np.abs(part.astype(int) - whole).mean() < 8


@pytest.mark.parametrize("share", [0.9999, 1.0])
def test_a_photo_that_lacks_its_end_mark_alone_is_whole(tmp_path: Path, share: float) -> None:
    noise().save(tmp_path / "a.jpg", quality=90)
    whole, data = load_photo(tmp_path / "a.jpg"), (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: int(len(data) * share)] if share < 1 else data[:-2])
    notes: list[str] = []
    assert np.array_equal(load_photo(tmp_path / "a.jpg", notes), whole)
    assert notes == []


@pytest.mark.parametrize(("name", "kept"), [("a.jpg", 700), ("a.png", 60), ("a.webp", 900)])
def test_photos_that_are_cut_too_short_are_refused(tmp_path: Path, name: str, kept: int) -> None:
    noise().save(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
    with pytest.raises(DheadsError, match=r"\.\w+: the photo is damaged \(\w.*; export or copy it again"):
        load_photo(tmp_path / name)


def test_an_interlaced_photo_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    """Each pass has pixels of all rows, so all rows lack some."""
    pixels = np.asarray(noise())
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in passes for row in pixels[y::dy, x::dx])
    data = png_file(pixels.shape[1], pixels.shape[0], rows, interlace=1)
    (tmp_path / "a.png").write_bytes(data)
    assert np.array_equal(load_photo(tmp_path / "a.png"), pixels)
    (tmp_path / "a.png").write_bytes(data[: len(data) * 8 // 10])
    with pytest.raises(DheadsError, match="damaged"):
        load_photo(tmp_path / "a.png")


# --- Animated pictures


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.avif"])
def test_animated_pictures_are_videos(tmp_path: Path, name: str) -> None:
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this build of Pillow knows no AVIF")
    colours = [(0, 0, 0), (200, 60, 60), (60, 200, 60)]
    first, *others = (Image.new("RGB", (32, 24), colour) for colour in colours)
    first.save(tmp_path / name, save_all=True, append_images=others, duration=[40, 120, 400], loop=0)
    with pytest.raises(NotAPhoto, match=rf"{name}: this picture moves; save one of its frames"):
        load_photo(tmp_path / name)
    pictures, seconds = zip(*open_animation(tmp_path / name), strict=True)
    assert np.abs(np.array([picture[12, 16] for picture in pictures]) - np.array(colours)).max() <= 6
    assert seconds == pytest.approx((0.04, 0.12, 0.4), abs=0.002)


def test_a_still_picture_is_no_animation(tmp_path: Path) -> None:
    for name in ("a.gif", "a.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        assert open_animation(tmp_path / name) is None
    (tmp_path / "text.gif").write_text("no picture", encoding="utf-8")
    assert open_animation(tmp_path / "text.gif") is None


def test_an_animation_that_is_cut_short_gives_what_it_holds(tmp_path: Path) -> None:
    frames = [noise() for _ in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=[f.rotate(90 * k) for k, f in enumerate(frames)])
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(data[: len(data) // 2])
    pictures = list(open_animation(tmp_path / "a.gif"))
    assert 1 <= len(pictures) < 4
    assert all(seconds == 0.1 for _, seconds in pictures)  # as in browsers when a file states none
