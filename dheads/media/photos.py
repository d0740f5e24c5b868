"""Any photo -> (H, W, 3) uint8 RGB, upright; animated pictures frame by frame."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

PHOTOS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif", ".heic", ".heif", ".bmp", ".tif", ".tiff"})  # endings
PHOTO_LIMIT_PX = 200_000_000  # telephones make as many; more would fill the memory
_BAND_PX = 2**20  # converted at a time, as some modes take many times the memory
_BLOCK_PX = 16  # rows that a JPEG decoder gives at once
# What the missing part of a picture is filled with before colours are converted; Adobe's CMYK is inverted.
_BLANK = {"JPEG": {127, 128}, "PNG": {0}}
_ANIMATED = {"GIF", "PNG", "WEBP", "AVIF"}
_LEAST_SECONDS, _USUAL_SECONDS = 0.011, 0.1  # a frame of an animated picture; browsers show shorter ones so long


class NotAPhoto(DheadsError):
    """The file is in no format of photos, or moves; it may be a video."""


def load_photo(path: Path | str, notes: list[str] | None = None) -> np.ndarray:
    """A photo as (H, W, 3) uint8 sRGB: turned upright by its EXIF tag, alpha over white.

    Of a JPEG or PNG file that is cut short it is the rows before the cut; `notes` gets a sentence that says so.
    Raises DheadsError where there is no readable picture, or one of more than 200 megapixels; NotAPhoto for what is in
    another format, or animated.
    """
    path = Path(path)
    with _opened(path) as photo:
        if _moves(photo):
            raise NotAPhoto(f"{path}: this picture moves; save one of its frames as JPEG or PNG")
        rows = _decoded_rows(photo)
        if rows < photo.height and notes is not None:
            notes.append(f"{path} is cut short: {1 - rows / photo.height:.0%} of the picture are missing")
        return _rgb(photo, rows)


def open_animation(path: Path) -> Iterator[tuple[np.ndarray, float]] | None:
    """The pictures, (H, W, 3) uint8 sRGB, and the seconds each is shown of an animated GIF, PNG, WebP or AVIF file.

    None for any other file. Raises DheadsError, later, for damaged ones.
    """
    try:
        with _opened(path) as photo:
            return _animation(path) if _moves(photo) else None
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
            yield _rgb(photo, photo.height), seconds if seconds >= _LEAST_SECONDS else _USUAL_SECONDS


def hush_pillow() -> None:
    """For a program of our own: it says nothing of odd tags and damage on stderr, beside our sentences."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", module=r"PIL\.")


# --- Opening ---------------------------------------------------------------------------------------------------------


class _Jpeg(JpegImageFile):
    """A file that ends early is ended for the decoder, which then gives what it has."""

    def load_read(self, read_bytes: int) -> bytes:
        data = self.fp.read(read_bytes)
        self.is_cut = not data
        return data or b"\xff\xd9"


def _heif(file: BinaryIO, name: str) -> ImageFile.ImageFile:
    from pillow_heif import HeifImageFile  # its library takes time to load

    return HeifImageFile(file, name)


# By what their files begin with. Image.open() would hold all to limits that belong to the whole process, and knows
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
    """A photo whose header is read. What is wrong with it, now or later, becomes a DheadsError."""
    try:
        if is_endless(path):
            raise DheadsError(f"{path}: is a pipe or a device; name a photo such as a JPEG or PNG file")
        with path.open("rb") as file:
            head = file.read(64)
            reader = next((made for begin, made in _READERS if re.match(begin, head, re.DOTALL)), None)
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


def _moves(photo: ImageFile.ImageFile) -> bool:
    return photo.format in _ANIMATED and getattr(photo, "is_animated", False)


# --- Decoding --------------------------------------------------------------------------------------------------------


def _decoded_rows(photo: ImageFile.ImageFile) -> int:
    """Decodes a photo; how many of its rows there are, fewer than its height where the file is cut short."""
    try:
        photo.load()
        is_cut = getattr(photo, "is_cut", False)
    except OSError as error:
        if photo.format != "PNG" or photo.info.get("interlace") or "truncated" not in str(error):
            raise
        photo.tile = []  # what is decoded already is all there is
        is_cut = True
    rows = photo.height
    while is_cut and rows > 0:
        corner = _part(photo, max(photo.width - 8, 0), max(rows - 8, 0), photo.width, rows)
        if not set(np.unique(corner)) <= _BLANK[photo.format]:
            break
        rows = (rows - 1) // _BLOCK_PX * _BLOCK_PX
    if rows == 0:
        raise OSError("it holds no pixels")
    return rows


def _rgb(photo: ImageFile.ImageFile, rows: int) -> np.ndarray:
    """(H, W, 3) uint8 sRGB of a decoded photo's first rows, upright."""
    orientation = _orientation(photo)
    across = orientation > 4
    upright = np.empty((photo.width, rows, 3) if across else (rows, photo.width, 3), np.uint8)
    stored = _AS_STORED.get(orientation, np.asarray)(upright)  # a view of it
    to_srgb = _converter(photo)
    step = max(1, _BAND_PX // photo.width)
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        stored[top:bottom] = to_srgb(_part(photo, 0, top, photo.width, bottom))
    signalled = photo.info.get("nclx_profile")
    return upright if "icc_profile" in photo.info or not signalled else _from_signalled(upright, signalled)


def _part(photo: Image.Image, left: int, top: int, right: int, bottom: int) -> Image.Image:
    # As crop(), which would hold it to the limit of the whole process.
    return photo.resize((right - left, bottom - top), Image.Resampling.NEAREST, (left, top, right, bottom))


def _orientation(photo: ImageFile.ImageFile) -> int:
    try:
        return photo.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as with damaged files; viewers show the photo
        return 1


# How a camera stores an upright picture, by the number in the EXIF tag.
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

_SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}  # what an ICC profile is of, as a mode of Pillow
_SRGB = ImageCms.createProfile("sRGB")


def _converter(photo: ImageFile.ImageFile) -> Callable[[Image.Image], Image.Image]:
    """What turns a part of the photo to sRGB."""
    full_scale = _full_scale(photo) if photo.mode.startswith(("I", "F")) else None
    gray = full_scale or photo.mode in ("1", "L", "LA", "La")
    mode = "L" if gray else photo.mode if photo.mode in ("CMYK", "LAB") else "RGB"
    mode, transform = _profile(photo, mode)

    def convert(part: Image.Image) -> Image.Image:
        alpha = None
        if full_scale:
            part = _scaled(part, full_scale)
        elif part.has_transparency_data:
            part = part.convert("RGBA")
            alpha, part = part.getchannel("A"), part.convert("RGB")
        if part.mode != mode:
            part = part.convert(mode)
        part = ImageCms.applyTransform(part, transform) if transform else part.convert("RGB")
        return Image.composite(part, Image.new("RGB", part.size, "white"), alpha) if alpha else part

    return convert


def _profile(photo: ImageFile.ImageFile, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that a photo's ICC profile is of, and its way to sRGB; a profile that is broken or unfit is ignored."""
    data = photo.info.get("icc_profile")
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(data)) if data else None
        space = _SPACES.get(profile.profile.xcolor_space.strip()) if profile else None
        if space == mode or (space, mode) == ("RGB", "L"):
            return space, _to_srgb(profile, space)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        pass
    return mode, _to_srgb(ImageCms.createProfile("LAB"), mode) if mode == "LAB" else None


def _to_srgb(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        profile,
        _SRGB,
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _full_scale(photo: ImageFile.ImageFile) -> float:
    """The white of a photo of 16 or 32 bits, of which convert() would clip."""
    if ";16" in photo.mode:
        return 65535.0
    most = float(np.nan_to_num(np.asarray(photo)).max())
    return next((s for s in (1.0, 255.0, 65535.0, 2.0**32 - 1) if most <= s), most)


def _scaled(part: Image.Image, full_scale: float) -> Image.Image:
    values = np.nan_to_num(np.asarray(part).astype(np.float64)) / full_scale
    return Image.fromarray(np.round(np.clip(values, 0, 1) * 255).astype(np.uint8))


def _from_signalled(image: np.ndarray, colours: dict[str, int]) -> np.ndarray:
    """sRGB of a picture (H, W, 3) whose colours are told as in video."""
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    frame.color_primaries, frame.color_trc = colours["color_primaries"], colours["transfer_characteristics"]
    return ToRgb()(frame)
