"""Any photo -> (H, W, 3) uint8 RGB, upright."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dheads.errors import DheadsError
from dheads.files import is_endless

PHOTOS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff"})  # file endings
PHOTO_SIDE_PX = 4096  # a longer photo is reduced to this
PHOTO_LIMIT_PX = 200_000_000  # telephones make as many; more would fill the memory
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")  # EPS would run a program
# What the file type box of a HEIC or AVIF file names.
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis"})

logging.getLogger("PIL").addHandler(logging.NullHandler())  # it would speak of damage on stderr beside our sentence


class NotAPhoto(DheadsError):
    """The file is in no format of photos; it may be a video."""


def load_photo(path: Path) -> np.ndarray:
    """A photo as (H, W, 3) uint8 RGB: turned upright by its EXIF tag, alpha over white, long side at most 4096 px.

    Raises DheadsError where there is no readable picture, or one of more than 200 megapixels; NotAPhoto for what is in
    another format.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        if is_endless(path):
            raise DheadsError(f"{path}: is a pipe or a device; name a photo such as a JPEG or PNG file")
        Image.MAX_IMAGE_PIXELS = PHOTO_LIMIT_PX
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd tags
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=PHOTO_FORMATS) as photo:
                photo.draft(None, (PHOTO_SIDE_PX, PHOTO_SIDE_PX))
                photo = _to_rgb(_reduced(ImageOps.exif_transpose(photo)))
    except FileNotFoundError:
        raise DheadsError(f"{path}: there is no such file; check the path of the photo") from None
    except (IsADirectoryError, PermissionError) as error:
        kind = "is a folder" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise DheadsError(f"{path}: {kind}; name a photo such as a JPEG or PNG file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DheadsError(f"{path}: the photo has more than 200 megapixels; reduce it first") from None
    except UnidentifiedImageError:
        if _is_heif(path):  # Pillow's wheels read no HEIC, and old ones no AVIF
            raise DheadsError(
                f"{path}: this is a HEIC or AVIF photo, which cannot be read here; convert it to JPEG or PNG"
            ) from None
        raise NotAPhoto(f"{path}: this is not a photo in a known format; save it as JPEG or PNG") from None
    except OSError as error:
        if error.errno is not None:
            raise DheadsError(f"{path}: cannot be read ({error.strerror}); name another photo") from None
        raise _damaged(path, error) from None
    except DheadsError:
        raise
    except Exception as error:  # Pillow's readers raise anything at damaged files
        raise _damaged(path, error) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return np.array(photo)


def _damaged(path: Path, error: Exception) -> DheadsError:
    reason = str(error) or type(error).__name__
    return DheadsError(f"{path}: the photo is damaged ({reason}); export or copy it again")


def _is_heif(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:] in _HEIF_BRANDS


def _reduced(photo: Image.Image) -> Image.Image:
    """The long side at most 4096 px; before all else, as other modes take many times the memory."""
    if photo.mode in ("1", "P", "PA"):  # palettes cannot be averaged
        photo = photo.convert("RGBA" if photo.has_transparency_data else "RGB")
    photo.thumbnail((PHOTO_SIDE_PX, PHOTO_SIDE_PX), Image.Resampling.LANCZOS)
    return photo


def _to_rgb(photo: Image.Image) -> Image.Image:
    if photo.mode.startswith(("I", "F")):  # 16 or 32 bits: convert() would clip
        values = np.asarray(photo).astype(np.float64)
        scales = [65535.0] if ";16" in photo.mode else [1.0, 255.0, 65535.0, 2.0**32 - 1]
        full_scale = next((s for s in scales if values.max() <= s), values.max())
        photo = Image.fromarray(np.round(np.clip(values / full_scale, 0, 1) * 255).astype(np.uint8))
    if photo.has_transparency_data:
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo.convert("RGB")
