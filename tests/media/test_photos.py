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
from PIL import Image, ImageCms, ImageFile, features
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
def test_the_limits_of_the_caller_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Nothing of Pillow's that belongs to the whole process is changed, nor does it matter."""
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
def test_of_a_photo_that_is_cut_short_its_first_rows_are_left(tmp_path: Path, name: str, options: dict) -> None:
    path = tmp_path / name
    noise().save(path, **options)
    whole = load_photo(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    notes: list[str] = []
    part = load_photo(path, notes)
    assert 80 <= len(part) <= 140
    # Of JPEG's chroma the last row knows only what lies above it.
    assert np.abs(part[:-1].astype(int) - whole[: len(part) - 1]).max() <= 2
    assert notes == [f"{path} is cut short: {1 - len(part) / 200:.0%} of the picture are missing"]


def test_a_turned_photo_that_is_cut_short(tmp_path: Path) -> None:
    """What is missing are the last rows as they are stored: here the left columns."""
    exif = Image.Exif()
    exif[274] = 6
    noise().save(tmp_path / "a.jpg", quality=90, exif=exif)
    whole = load_photo(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) * 6 // 10])
    part = load_photo(tmp_path / "a.jpg")
    assert (whole.shape, len(part)) == ((96, 200, 3), 96)
    assert np.abs(part[:, 1:].astype(int) - whole[:, -part.shape[1] + 1 :]).max() <= 2


def test_of_a_progressive_photo_that_is_cut_short_detail_is_missing(tmp_path: Path) -> None:
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
def test_photos_of_which_too_little_is_left(tmp_path: Path, name: str, kept: int) -> None:
    noise().save(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
    with pytest.raises(DheadsError, match=r"\.\w+: the photo is damaged \(\w.*; export or copy it again"):
        load_photo(tmp_path / name)


def test_an_interlaced_photo_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    """Each pass holds pixels of all rows, so all rows lack some."""
    pixels = np.asarray(noise())
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in passes for row in pixels[y::dy, x::dx])
    data = png_file(pixels.shape[1], pixels.shape[0], rows, interlace=1)
    (tmp_path / "a.png").write_bytes(data)
    assert np.array_equal(load_photo(tmp_path / "a.png"), pixels)
    (tmp_path / "a.png").write_bytes(data[: len(data) * 8 // 10])
    with pytest.raises(DheadsError, match="damaged"):
        load_photo(tmp_path / "a.png")


# --- Colour profiles

XYZ_TO_SRGB = np.array(  # from the D50 of profiles, in linear light
    [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
)
DISPLAY_P3 = (0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)  # XYZ of red, green, blue


def srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light (..., 3) -> values of 255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def profile(space: bytes, connection: bytes, **tags: bytes) -> bytes:
    """An ICC profile, version 2.4."""
    text = b"text\0\0\0\0none\0"
    name = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"none\0" + bytes(78)
    everything = {"desc": name, "cprt": text, "wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249), **tags}
    table, data, begin = struct.pack(">I", len(everything)), b"", 128 + 4 + 12 * len(everything)
    for tag, content in everything.items():
        table += tag.encode() + struct.pack(">II", begin + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    kinds = (b"prtr" if space == b"CMYK" else b"mntr") + space + connection
    head = struct.pack(">I4sI12s12s4s", begin + len(data), b"none", 0x02400000, kinds, bytes(12), b"acsp")
    return (head + bytes(28) + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + data


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"


def rgb_profile(primaries: tuple = DISPLAY_P3, curve: float = 2.2) -> bytes:
    colours = {f"{c}XYZ": b"XYZ \0\0\0\0" + fixed(*xyz) for c, xyz in zip("rgb", primaries, strict=True)}
    return profile(b"RGB ", b"XYZ ", **colours, **dict.fromkeys(["rTRC", "gTRC", "bTRC"], gamma(curve)))


def as_display_p3(picture: np.ndarray) -> np.ndarray:
    """sRGB (H, W, 3) uint8 in the values of Display P3."""
    value = picture / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.linalg.inv(XYZ_TO_SRGB).T
    return np.rint(255 * np.clip(xyz @ np.linalg.inv(np.array(DISPLAY_P3)), 0, 1) ** (1 / 2.2)).astype(np.uint8)


@pytest.fixture
def face(examples: Path) -> np.ndarray:
    return np.asarray(Image.open(examples / "face.jpg"))[:256, :256]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.avif", "a.heic"])
def test_a_colour_profile_tells_what_the_values_mean(tmp_path: Path, face: np.ndarray, name: str) -> None:
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this build of Pillow knows no AVIF")
    shown = as_display_p3(face)
    assert np.abs(shown.astype(int) - face).mean() > 3.5
    save(Image.fromarray(shown), tmp_path / name, quality=95, icc_profile=rgb_profile())
    error = load_photo(tmp_path / name).astype(int) - face
    assert np.abs(error).mean() < 2.5
    assert np.abs(error.mean(axis=(0, 1))).max() < 1


def save(photo: Image.Image, path: Path, **options: object) -> None:
    if path.suffix == ".heic":
        from_pillow(photo).save(path, **options)
    else:
        photo.save(path, **options)


def test_the_profile_of_a_palette_and_what_is_transparent_under_it(tmp_path: Path) -> None:
    colours = np.array([[255, 0, 0], [200, 100, 50]], np.uint8)
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette(as_display_p3(colours[None])[0].ravel().tolist())
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "a.png", transparency=bytes([0, 255]), icc_profile=rgb_profile())
    photo = load_photo(tmp_path / "a.png").astype(int)
    assert np.abs(photo[4, 4] - colours[1]).max() <= 3
    assert photo[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_the_profile_of_a_gray_photo(tmp_path: Path, mode: str) -> None:
    pixel = {"L": 100, "LA": (100, 255), "1": 1, "I;16": 100 * 257}[mode]
    gray = profile(b"GRAY", b"XYZ ", kTRC=gamma(1.0))
    Image.new(mode, (8, 8), pixel).save(tmp_path / "a.png", icc_profile=gray)
    expected = 255 if mode == "1" else float(srgb(np.array(100 / 255)))
    assert np.abs(load_photo(tmp_path / "a.png") - expected).max() <= 3


def test_a_gray_photo_may_have_a_profile_of_colours(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 100).save(tmp_path / "a.jpg", icc_profile=rgb_profile(curve=1.0))
    assert np.abs(load_photo(tmp_path / "a.jpg") - float(srgb(np.array(100 / 255)))).max() <= 3


def test_the_profile_of_a_printed_photo(tmp_path: Path) -> None:
    """CMYK of inks that are paler than pure ones."""
    inks = np.array([[-30, -15, -20], [-30, 30, 0], [-10, 0, 40], [-40, 0, 0]])  # what each adds to the paper's Lab
    paper = np.array([100.0, 0, 0])
    mixed = np.array(np.meshgrid(*[[0, 1]] * 4, indexing="ij")).reshape(4, -1).T  # the last ink changes fastest
    lab = np.maximum(paper + mixed @ inks, (5, -99, -99))
    nodes = np.rint(lab * (2.55, 1, 1) + (0, 128, 128)).astype(np.uint8)
    ramp, unit = bytes(range(256)), fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lookup = 4 * ramp + nodes.tobytes() + 3 * ramp
    icc = profile(b"CMYK", b"Lab ", A2B0=b"mft1\0\0\0\0\4\3\2\0" + unit + lookup)
    for number, (lightness, a, b) in enumerate(nodes / (2.55, 1, 1) - (0, 128, 128)):
        if number % 2 == 0 and number < 12:  # without black, and in sRGB's gamut
            Image.new("CMYK", (8, 8), tuple((255 * mixed[number]).tolist())).save(tmp_path / "a.tif", icc_profile=icc)
            fy = (lightness + 16) / 116
            xyz = np.array([fy + a / 500, fy, fy - b / 200]) ** 3 * (0.9642, 1, 0.8249)
            assert np.abs(load_photo(tmp_path / "a.tif")[4, 4] - srgb(xyz @ XYZ_TO_SRGB.T)).max() <= 3, number


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"no profile at all",
        bytes(500),
        rgb_profile()[:200],
        profile(b"CMYK", b"Lab "),
        profile(b"RGB ", b"XYZ "),
        profile(b"GRAY", b"XYZ ", kTRC=gamma(1.0)),
    ],
)
def test_a_profile_that_is_broken_or_of_another_kind_is_ignored(tmp_path: Path, broken: bytes) -> None:
    Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / "a.png", icc_profile=broken)
    assert (load_photo(tmp_path / "a.png") == (200, 100, 50)).all()


def test_a_photo_in_lab(tmp_path: Path) -> None:
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    ImageCms.applyTransform(Image.new("RGB", (8, 8), (200, 100, 50)), lab).save(tmp_path / "a.tif")
    assert np.abs(load_photo(tmp_path / "a.tif").astype(int) - (200, 100, 50)).max() <= 3


# --- HEIC


def test_heic_photos_of_tiles_that_are_turned(tmp_path: Path, face: np.ndarray) -> None:
    """As a telephone writes them: of tiles, turned by the container, with an EXIF tag too, in Display P3."""
    exif = Image.Exif()
    exif[274] = 6
    stored = from_pillow(Image.fromarray(np.ascontiguousarray(np.rot90(as_display_p3(face)))))
    options = {"exif": exif.tobytes(), "icc_profile": rgb_profile(), "tile_size": 64}
    stored.save(tmp_path / "a.heic", quality=95, **options)
    photo = load_photo(tmp_path / "a.heic")
    assert photo.shape == face.shape
    assert np.abs(photo.astype(int) - face).mean() < 3
    assert (tmp_path / "a.heic").read_bytes().count(b"hvc1") == 16


def test_heic_photos_whose_colours_are_told_as_in_video(tmp_path: Path, face: np.ndarray) -> None:
    picture = from_pillow(Image.fromarray(as_display_p3(face)))
    told = {"color_primaries": 12, "transfer_characteristics": 13, "matrix_coefficients": 6, "full_range_flag": 1}
    picture.save(tmp_path / "a.heic", quality=95, save_nclx_profile=True, **told)
    assert np.abs(load_photo(tmp_path / "a.heic").astype(int) - face).mean() < 3


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


def test_what_stands_still_is_no_animation(tmp_path: Path) -> None:
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
    assert all(seconds == 0.1 for _, seconds in pictures)  # as browsers do where a file says none
