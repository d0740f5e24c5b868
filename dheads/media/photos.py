"""Photos as upright (H, W, 3) uint8 sRGB, and animated pictures frame by frame."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from dheads.errors import DheadsError
from dheads.media.colours import ToRgb
from dheads.system.files import is_endless

# File name endings, in lower case.
PHOTOS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif", ".heic", ".heif", ".bmp", ".tif", ".tiff"})
PHOTO_LIMIT_PX = 200_000_000  # phone cameras reach it; larger photos would fill the memory
_BAND_PX = 2**20  # converted at a time, as some modes take many times the memory of RGB
_BLOCK_PX = 16  # rows that a JPEG decoder outputs at once
# The values of missing pixels before colours are converted; Adobe's CMYK is inverted.
_BLANK = {"JPEG": {127, 128}, "PNG": {0}}
_ANIMATED = {"GIF", "PNG", "WEBP", "AVIF"}
# Like browsers, show frames of an animation that claim less than the first for the second.
_MIN_SECONDS, _DEFAULT_SECONDS = 0.011, 0.1


class NotAPhoto(DheadsError):
    """The file has no photo format, or is animated; it may be a video."""


def load_photo(path: Path | str, notes: list[str] | None = None) -> np.ndarray:
    """A photo as (H, W, 3) uint8 sRGB, turned upright by its EXIF tag, transparent parts over white.

    A truncated JPEG or PNG file gives the rows before the cut, and a sentence about it is appended to `notes`.
    Raises DheadsError for a missing, unreadable or damaged photo and for more than 200 megapixels, and its subclass
    NotAPhoto for another format or an animated picture.
    """
    path = Path(path)
    with _opened(path) as photo:
        if _is_animated(photo):
            raise NotAPhoto(f"{path}: this picture moves; save one of its frames as JPEG or PNG")
        rows = _decoded_rows(photo)
        if rows < photo.height and notes is not None:
            notes.append(f"{path} is cut short: {1 - rows / photo.height:.0%} of the picture are missing")
        return _rgb(photo, rows)


def open_animation(path: Path) -> Iterator[tuple[np.ndarray, float]] | None:
    """The pictures (H, W, 3) uint8 sRGB of an animated GIF, PNG, WebP or AVIF file, each with its duration in seconds.

    None for any other file. The iterator raises DheadsError for a damaged file.
    """
    try:
        with _opened(path) as photo:
            return _animation(path) if _is_animated(photo) else None
    except DheadsError:
        return None


def _animation(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    with _opened(path) as photo:
        for index in count():
            try:
                photo.seek(index)
                photo.load()
            except Exception as error:  # Pillow's readers raise anything at damaged files
                if index == 0 and not isinstance(error, EOFError):
                    raise
                return
            seconds = (photo.info.get("duration") or 0) / 1000
            yield _rgb(photo, photo.height), seconds if seconds >= _MIN_SECONDS else _DEFAULT_SECONDS


def silence_pillow() -> None:
    """Keep Pillow's warnings about odd tags and damage off stderr, where the program prints its own messages."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", module=r"PIL\.")


# --- Opening ---------------------------------------------------------------------------------------------------------


class _Jpeg(JpegImageFile):
    """A JPEG reader that appends the end marker to a truncated file, so that the decoder outputs the rows it has."""

    def load_read(self, read_bytes: int) -> bytes:
        assert self.fp is not None
        data = self.fp.read(read_bytes)
        self.is_cut = not data
        return data or b"\xff\xd9"


def _heif(file: BinaryIO, name: str) -> ImageFile.ImageFile:
    from pillow_heif import HeifImageFile  # its library takes time to load

    photo: ImageFile.ImageFile = HeifImageFile(file, name)  # type: ignore[no-untyped-call]
    return photo


# Readers by the first bytes of a file. Image.open() would apply limits that are global to the process, and supports
# formats that run programs (EPS).
_READERS: list[tuple[bytes, Callable[[BinaryIO, str], ImageFile.ImageFile]]] = [
    (rb"\xff\xd8\xff", _Jpeg),
    (rb"\x89PNG\r\n\x1a\n", PngImageFile),
    (rb"RIFF....WEBP", WebPImageFile),
    (rb"....ftyp(avi[fs]|(mif1|msf1).{0,40}avi[fs])", AvifImageFile),
    (rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", _heif),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", TiffImageFile),
    (rb"BM", BmpImageFile),
    (rb"GIF8[79]a", GifImageFile),
    (rb"P[1-6fy]\s", PpmImageFile),
    (rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n", Jpeg2KImageFile),
]


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """A photo with its header read. Errors of opening it, and of reading it within the block, become DheadsError."""
    try:
        if is_endless(path):
            raise DheadsError(f"{path}: is a pipe or a device; name a photo such as a JPEG or PNG file")
        with path.open("rb") as file:
            head = file.read(64)
            reader = next((reader for magic, reader in _READERS if re.match(magic, head, re.DOTALL)), None)
            if reader is None:
                raise NotAPhoto(f"{path}: this is not a photo in a known format; save it as JPEG or PNG")
            file.seek(0)
            photo = reader(file, str(path))
            if photo.width * photo.height > PHOTO_LIMIT_PX:
                raise Image.DecompressionBombError
            yield photo
    except DheadsError:
        raise
    except FileNotFoundError:
        raise DheadsError(f"{path}: there is no such file; check the path of the photo") from None
    except (IsADirectoryError, PermissionError) as error:
        kind = "is a folder" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise DheadsError(f"{path}: {kind}; name a photo such as a JPEG or PNG file") from None
    except Image.DecompressionBombError:
        raise DheadsError(f"{path}: the photo has more than 200 megapixels; reduce it first") from None
    except OSError as error:
        if error.errno is not None:
            raise DheadsError(f"{path}: cannot be read ({error.strerror}); name another photo") from None
        raise _damaged(path, error) from None
    except Exception as error:  # Pillow's readers raise anything at damaged files
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DheadsError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DheadsError(f"{path}: the photo is damaged ({reason}); export or copy it again")


def _is_animated(photo: ImageFile.ImageFile) -> bool:
    return photo.format in _ANIMATED and getattr(photo, "is_animated", False)


# --- Decoding --------------------------------------------------------------------------------------------------------


def _decoded_rows(photo: ImageFile.ImageFile) -> int:
    """Decode a photo; returns the number of its rows, less than its height if the file is truncated."""
    try:
        photo.load()
        is_cut = getattr(photo, "is_cut", False)
    except OSError as error:
        if photo.format != "PNG" or photo.info.get("interlace") or "truncated" not in str(error):
            raise
        photo.tile = []  # nothing is left to decode
        is_cut = True
    rows = photo.height
    blank = _BLANK.get(photo.format or "", set())
    while is_cut and rows > 0:
        corner = _part(photo, max(photo.width - 8, 0), max(rows - 8, 0), photo.width, rows)
        if not set(np.unique(np.asarray(corner))) <= blank:
            break
        rows = (rows - 1) // _BLOCK_PX * _BLOCK_PX
    if rows == 0:
        raise OSError("it holds no pixels")
    return rows


def _rgb(photo: ImageFile.ImageFile, rows: int) -> np.ndarray:
    """The first rows of a decoded photo as upright (H, W, 3) uint8 sRGB."""
    orientation = _orientation(photo)
    is_sideways = orientation > 4
    upright = np.empty((photo.width, rows, 3) if is_sideways else (rows, photo.width, 3), np.uint8)
    stored = _AS_STORED.get(orientation, np.asarray)(upright)  # a view of `upright`
    to_srgb = _converter(photo)
    step = max(1, _BAND_PX // photo.width)
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        stored[top:bottom] = to_srgb(_part(photo, 0, top, photo.width, bottom))
    h273_colours = photo.info.get("nclx_profile")
    return upright if "icc_profile" in photo.info or not h273_colours else _from_h273(upright, h273_colours)


def _part(photo: Image.Image, left: int, top: int, right: int, bottom: int) -> Image.Image:
    # Not crop(), which applies a limit that is global to the process.
    return photo.resize((right - left, bottom - top), Image.Resampling.NEAREST, (left, top, right, bottom))


def _orientation(photo: ImageFile.ImageFile) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if the tag is missing or damaged."""
    try:
        orientation: int = photo.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's readers raise anything at damaged files
        return 1
    return orientation


# How a camera stores an upright picture, by the EXIF orientation.
_AS_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


# --- Colours ---------------------------------------------------------------------------------------------------------

_SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}  # Pillow's mode of an ICC profile's colour space
_SRGB = ImageCms.createProfile("sRGB")


def _converter(photo: ImageFile.ImageFile) -> Callable[[Image.Image], Image.Image]:
    """A function that converts a part of the photo to sRGB."""
    full_scale = _full_scale(photo) if photo.mode.startswith(("I", "F")) else None
    gray = full_scale or photo.mode in ("1", "L", "LA", "La")
    mode = "L" if gray else photo.mode if photo.mode in ("CMYK", "LAB") else "RGB"
    mode, transform = _profile(photo, mode)

    def convert(part: Image.Image) -> Image.Image:
        alpha: Image.Image | None = None
        if full_scale:
            part = _scaled(part, full_scale)
        elif part.has_transparency_data:
            part = part.convert("RGBA")
            alpha, part = part.getchannel("A"), part.convert("RGB")
        if part.mode != mode:
            part = part.convert(mode)
        part = _transformed(part, transform) if transform else part.convert("RGB")
        return Image.composite(part, Image.new("RGB", part.size, "white"), alpha) if alpha else part

    return convert


def _profile(photo: ImageFile.ImageFile, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode of a photo's ICC profile and its transform to sRGB; a broken or unsuitable profile is ignored."""
    if data := photo.info.get("icc_profile"):
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            profile = ImageCms.ImageCmsProfile(BytesIO(data))
            space = _SPACES.get(profile.profile.xcolor_space.strip(), "")
            if space == mode or (space, mode) == ("RGB", "L"):
                return space, _to_srgb(profile, space)
    if mode == "LAB":
        return mode, _to_srgb(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), mode)
    return mode, None


def _to_srgb(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        profile,
        _SRGB,
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _transformed(part: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    result = ImageCms.applyTransform(part, transform)
    assert result is not None  # only transforms that change their input return None
    return result


def _full_scale(photo: ImageFile.ImageFile) -> float:
    """The value of white in a photo of 16 or 32 bits, which Pillow's convert() would clip."""
    if ";16" in photo.mode:
        return 65535.0
    largest = float(np.nan_to_num(np.asarray(photo)).max())
    return next((white for white in (1.0, 255.0, 65535.0, 2.0**32 - 1) if largest <= white), largest)


def _scaled(part: Image.Image, full_scale: float) -> Image.Image:
    values = np.nan_to_num(np.asarray(part).astype(np.float64)) / full_scale
    return Image.fromarray(np.round(np.clip(values, 0, 1) * 255).astype(np.uint8))


def _from_h273(image: np.ndarray, colours: dict[str, int]) -> np.ndarray:
    """A picture (H, W, 3) uint8 with the primaries and transfer that the file gives as H.273 numbers -> sRGB."""
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    frame.color_primaries, frame.color_trc = colours["color_primaries"], colours["transfer_characteristics"]
    return ToRgb()(frame)
