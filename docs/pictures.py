"""Make the moving picture at the top of README.md: photos and a recording in, talking heads out.

python docs/pictures.py PHOTO PHOTO PHOTO --speech examples/speech.wav --out docs/talking.gif
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer
from PIL import Image

import dheads
from dheads.config import FPS, SAMPLE_RATE
from dheads.media.photos import load_photo
from dheads.media.sound import load_waveform

FACE, PHOTO, WAVE, GAP = 184, 64, 64, 8  # px: side of a result and of a photo, height of the waveform, margins
EVERY = 2  # frames of the video for one of the picture
COLOURS = 255
PAPER, INK, PLAYED = (255, 255, 255), (190, 196, 206), (24, 98, 196)


TILE, TIMES = 300, (0.1, 0.4, 0.65, 0.95)  # px of a pasted frame, and when in the video

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def talking(
    photos: Annotated[list[Path], typer.Argument(help="Photos with one face each.")],
    speech: Annotated[Path, typer.Option(help="What they say.")],
    out: Annotated[Path, typer.Option(help="The GIF.")],
    seed: int = 1,
) -> None:
    """Make a GIF of photos that speak."""
    talker = dheads.load()
    videos = [list(talker.frames(photo, speech, size=2 * FACE, seed=seed + n)) for n, photo in enumerate(photos)]
    waveform = load_waveform(speech).numpy()
    thumbnails = [fitted(load_photo(photo), PHOTO) for photo in photos]
    frames = [
        Image.fromarray(page([video[k] for video in videos], thumbnails, waveform, k * SAMPLE_RATE // FPS))
        for k in range(0, len(videos[0]), EVERY)
    ]
    # One palette for all frames, or colours flicker.
    palette = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames[::4]])).quantize(COLOURS, kmeans=1)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(out, save_all=True, append_images=others, duration=1000 * EVERY // FPS, loop=0, optimize=True)


@app.command()
def paste(
    photo: Annotated[Path, typer.Argument(help="A photo with room around the face.")],
    speech: Annotated[Path, typer.Option(help="What the person says.")],
    out: Annotated[Path, typer.Option(help="The JPEG.")],
    seed: int = 1,
) -> None:
    """Make a sheet of a head in its whole photo: still, moving, and moving twice as far, a row each."""
    talker, rows = dheads.load(), []
    for motion in (0.0, 1.0, 2.0):
        video = list(talker.frames(photo, speech, seed=seed, paste=True, motion=motion))
        rows.append(np.hstack([fitted(video[int(at * len(video))], TILE) for at in TIMES]))
    Image.fromarray(np.vstack(rows)).save(out, quality=88)


def page(faces: list[np.ndarray], thumbnails: list[np.ndarray], waveform: np.ndarray, played: int) -> np.ndarray:
    """One frame (H, W, 3) uint8: above the photos and the sound, below what is made of them. played: samples."""
    width = len(faces) * (FACE + GAP) - GAP
    sheet = np.full((PHOTO + GAP + FACE, width, 3), PAPER, np.uint8)
    for n, (face, thumbnail) in enumerate(zip(faces, thumbnails, strict=True)):
        sheet[:PHOTO, n * (PHOTO + GAP) :][:, :PHOTO] = thumbnail
        sheet[PHOTO + GAP :, n * (FACE + GAP) :][:, :FACE] = fitted(face, FACE)
    left = len(faces) * (PHOTO + GAP) + GAP
    sheet[:WAVE, left:] = wave(waveform, width - left, played)
    return sheet


def wave(waveform: np.ndarray, width: int, played: int) -> np.ndarray:
    """The sound (WAVE, width, 3), a bar for each 3 px; what is `played` has another colour."""
    picture = np.full((WAVE, width, 3), PAPER, np.uint8)
    bars = np.array_split(waveform, width // 3)
    peak = max(float(np.abs(waveform).max()), 1e-6)
    for k, bar in enumerate(bars):
        height = max(1, round(float(np.abs(bar).max()) / peak * (WAVE // 2 - 2)))
        colour = PLAYED if k * len(waveform) < played * len(bars) else INK
        picture[WAVE // 2 - height : WAVE // 2 + height, 3 * k : 3 * k + 2] = colour
    return picture


def fitted(picture: np.ndarray, side: int) -> np.ndarray:
    """The middle square of a picture (H, W, 3) at `side` px."""
    size = min(picture.shape[:2])
    top, left = (picture.shape[0] - size) // 2, (picture.shape[1] - size) // 2
    return cv2.resize(picture[top : top + size, left : left + size], (side, side), interpolation=cv2.INTER_AREA)


if __name__ == "__main__":
    app()
