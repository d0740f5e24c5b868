"""Colours of photos: ICC profiles, Lab, and HEIC's signalled colours."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features
from pillow_heif import from_pillow

from dheads.media.photos import load_photo

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
def test_a_colour_profile_is_applied(tmp_path: Path, face: np.ndarray, name: str) -> None:
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


def test_the_profile_of_a_palette_with_transparency(tmp_path: Path) -> None:
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


def test_a_gray_photo_with_an_rgb_profile(tmp_path: Path) -> None:
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


def test_heic_photos_with_signalled_colours(tmp_path: Path, face: np.ndarray) -> None:
    picture = from_pillow(Image.fromarray(as_display_p3(face)))
    signalled = {"color_primaries": 12, "transfer_characteristics": 13, "matrix_coefficients": 6, "full_range_flag": 1}
    picture.save(tmp_path / "a.heic", quality=95, save_nclx_profile=True, **signalled)
    assert np.abs(load_photo(tmp_path / "a.heic").astype(int) - face).mean() < 3
