"""A picture of a prepared dataset: the middle frames of its clips with their mouth boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load

from dheads.config import FPS
from dheads.dataset.manifest import Clip, clip_path
from dheads.errors import DheadsError
from dheads.media.reading import frame_at
from dheads.system.files import complete_or_absent

_CLIPS, _COLUMNS, _TILE_PX, _CAPTION_PX = 64, 8, 128, 12


def write_contact_sheet(out: Path, clips: list[Clip], path: Path) -> Path:
    """Write a PNG of up to 64 clips, evenly chosen, to `path`, and return that. Raises DheadsError where it fails."""
    chosen = [clips[k] for k in np.unique(np.linspace(0, len(clips) - 1, _CLIPS).round().astype(int))]
    width, height = _TILE_PX, _TILE_PX + _CAPTION_PX
    rows, columns = -(-len(chosen) // _COLUMNS), min(len(chosen), _COLUMNS)
    sheet = Image.new("RGB", (columns * width, rows * height))
    try:
        for k, clip in enumerate(chosen):
            row, column = divmod(k, _COLUMNS)
            sheet.paste(_tile(out, clip, (width, height)), (column * width, row * height))
        with complete_or_absent(path) as part:
            sheet.save(part, "PNG")
    except (OSError, SafetensorError) as error:
        raise DheadsError(f"cannot make {path}: {error}; the clips themselves are complete") from error
    return path


def _tile(out: Path, clip: Clip, size: tuple[int, int]) -> Image.Image:
    """The middle frame of a clip with its mouth box, above the clip's name."""
    middle = clip.frames // 2
    frame = Image.fromarray(frame_at(clip_path(out, clip.clip, "mp4"), middle / FPS))
    labels = load(clip_path(out, clip.clip, "safetensors").read_bytes())
    x0, y0, x1, y1 = (labels["mouth_box"][middle] * (_TILE_PX / frame.width)).tolist()
    tile = Image.new("RGB", size)
    tile.paste(frame.resize((_TILE_PX, _TILE_PX), Image.Resampling.LANCZOS))
    canvas = ImageDraw.Draw(tile)
    canvas.rectangle((x0, y0, x1 - 1, y1 - 1), outline="lime")
    canvas.text((2, _TILE_PX), clip.clip.rpartition("/")[2], "white", ImageFont.load_default(9))
    return tile
