"""How weights animate photos of people that they have not seen.

    python benchmarks/photos.py PHOTO... --weights run/weights.safetensors --speech SOUND --out photos

PHOTO is a photo or a folder of them. All photos speak the same sound, each with blinks and motion of its own. The
result is a table of the photos and of their mean on the screen and, in --out, report.json, contact.png and the videos.

What is heard is the opening of the mouth that the weights' lip code foretells from the sound:
slope          of the regression line of the shown opening over the heard one
follows        their correlation
range          of the shown opening as a share of the heard one's, 5th to 95th percentile
least          the 5th percentile of the shown opening, eye distances: how far lips stay apart
closes         of the frames in which the heard opening is in its lowest decile, the share in which the shown one is in
               the lowest fifth of its own range; by chance it is as often as `is low`
blinks/s       found in the video
lids           by how much lids close in the blinks that the network is given, as a share of their usual opening
flicker        mean difference of a pixel outside the mouth from the mean of the frames before and after, of 255
colour         drift of the face's colour from the first second to the last, of 255
sharpness      of the mouth region, as a share of the photo's
shape          distance of the landmarks that speech does not move from the photo's, eye distances
similarity     to the photo by MobileFaceNet (--identity-net)
yaw, roll, x   standard deviation of the head's pose, as faces/head_pose.py defines it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import typer
from endurance import animate, stage_of
from networks import IdentityNet
from torch import Tensor
from yardstick import SHEET_COLUMNS, envelope

from dheads.config import SAMPLE_RATE
from dheads.errors import DheadsError
from dheads.evaluation.comparison import head_motion
from dheads.evaluation.footage import Footage, aligned, track_face
from dheads.evaluation.measures import (
    blinks_per_second,
    colour_drift,
    face_colour,
    face_shapes,
    shape_distance,
    sharpness,
    slope,
    spread,
)
from dheads.evaluation.recognition import similarity
from dheads.evaluation.scoring import mean_values
from dheads.extensions.eyes import SHUT
from dheads.faces.alignment import mouth_box, mouth_opening
from dheads.faces.eyelids import eye_openness
from dheads.faces.landmarks import load_backend
from dheads.media.photos import PHOTOS
from dheads.media.sound import load_waveform, wav_file
from dheads.media.writing import write_video
from dheads.sampling.jobs import Job
from dheads.sampling.lockstep import VideoSpec
from dheads.sampling.staging import Stage
from dheads.sampling.talker import Talker, load
from dheads.speech.sync import correlation

COLUMNS = {
    "slope": "slope",
    "follows": "follows",
    "range": "range",
    "least": "least",
    "closes": "closes",
    "is low": "is_low",
    "blinks/s": "blinks_per_second",
    "lids": "lids",
    "flicker": "flicker",
    "colour": "colour_drift",
    "sharpness": "sharpness",
    "shape": "shape",
    "similarity": "similarity",
    "yaw": "head_range_yaw",
    "roll": "head_range_roll",
    "x": "head_range_x",
}
CLOSED = 0.2  # of the range of the shown opening
HEARD_CLOSED = 0.1  # share of the frames whose heard opening is the least
LATE = 3  # frames that lids may be later than the code


def main(
    photos: Annotated[list[Path], typer.Argument(help="Photos, or folders of them.")],
    speech: Annotated[Path, typer.Option(help="A recording of speech.")],
    out: Annotated[Path, typer.Option(help="Folder for report.json, contact.png and the videos.")],
    weights: str = "small",
    seconds: Annotated[float, typer.Option(help="Of the recording.")] = 6.0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; those of the weights by default.")] = None,
    identity_net: Annotated[Path | None, typer.Option(help="MobileFaceNet, an ONNX file.")] = None,
    size: Annotated[int, typer.Option(help="Side of the videos, px.")] = 256,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Measure how weights animate photos."""
    talker = load(weights, device)
    engine = talker.engine(Job(photos[0], speech, out, steps=steps))
    waveform = load_waveform(speech)[: round(seconds * SAMPLE_RATE)]
    embeddings = torch.cat(list(talker.hear([waveform])))
    stages, faces = read_faces(talker, photos, size)
    videos = [VideoSpec(s.photo, embeddings, seed + i, middle=s.middle) for i, s in enumerate(stages)]
    made = animate(engine, videos, [stage.finish for stage in stages])
    net = IdentityNet(identity_net) if identity_net else None
    rows: dict[str, dict[str, float]] = {}
    told = heard(talker, embeddings)
    out.mkdir(parents=True, exist_ok=True)
    for index, ((name, face), frames) in enumerate(zip(faces.items(), made, strict=True)):
        write_video(out / f"{name}.mp4", frames, wav_file(waveform))
        try:
            rows[name] = measure(face, frames, told, eye_code(talker, seed + index, embeddings), net)
        except DheadsError as error:  # no face is found
            print(f"{name} is not in the means: {error}")
    means = mean_values(rows.values())
    print(table({**rows, "mean": means}))
    report = {"weights": weights, "speech": str(speech), "seed": seed, "mean": means, "photos": rows}
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    sheet = contact_sheet(faces, made, speech)
    cv2.imwrite(str(out / "contact.png"), sheet[..., ::-1])


# ---- What the network is given ----


def read_faces(talker: Talker, photos: list[Path], size: int) -> tuple[list[Stage], dict[str, np.ndarray]]:
    """How the photos are animated, and their crops (S, S, 3) by names that are unique; those without a face are left
    out."""
    found = [
        path
        for photo in photos
        for path in (sorted(p for p in photo.iterdir() if p.suffix.lower() in PHOTOS) if photo.is_dir() else [photo])
    ]
    stages, faces = [], {}
    for path in found:
        try:
            stage, faces[f"{path.parent.name}_{path.stem}"] = stage_of(talker, path, size)
            stages.append(stage)
        except DheadsError as error:
            print(f"left out: {error}")
    return stages, faces


def heard(talker: Talker, speech: Tensor) -> np.ndarray | None:
    """The opening (F,) in eye distances that the sound foretells; None for weights without a lip code."""
    lips = talker.unet.lip_predictor
    return None if lips is None else lips.opening(speech.to(lips.mean.device)).cpu().numpy()


def eye_code(talker: Talker, seed: int, speech: Tensor) -> np.ndarray | None:
    """The eye code (F,) of the video of that seed; None for weights without one."""
    code = next((code for code in talker.unet.codes if code.name == "eyes"), None)
    if code is None:
        return None
    track = code.track(talker.unet.fitted(code), seed, talker.config.extensions.codes["eyes"].event_rate)
    return torch.cat([track.window(frame, speech, frame, 0) for frame in range(len(speech))])[:, 0].numpy()


# ---- Measures ----


def measure(
    photo: np.ndarray,
    frames: list[np.ndarray],
    heard: np.ndarray | None,
    eyes: np.ndarray | None,
    net: IdentityNet | None,
) -> dict[str, float]:
    """The measures of the video of one photo (S, S, 3); those without a value are absent."""
    shown = [photo, *frames]
    video = track_face("the video", lambda: shown, load_backend("mesh"))
    points = video.landmarks[1:]
    shapes = face_shapes(video.landmarks)
    sharp, colours = sharpness_and_colours(video)
    values = {
        "flicker": flicker(np.stack(frames), points),
        "colour_drift": colour_drift(colours[1:][video.seen[1:]]),
        "sharpness": np.nanmean(sharp[1:]) / sharp[0],
        "shape": np.nanmean(shape_distance(shapes[1:], shapes[0])),
        **lid_values(frames, points, eyes),
        **head_motion(points),
    }
    if heard is not None:
        values |= mouth_values(mouth_opening(points), heard)
    if net is not None:
        values["similarity"] = np.nanmean(similarity(net, frames, points, photo, video.landmarks[0]))
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


def sharpness_and_colours(video: Footage) -> tuple[np.ndarray, np.ndarray]:
    """The sharpness (F,) of the mouth and the mean colour (F, 3) of the face, in aligned crops; NaN without a face."""
    points, crops = aligned(video, video.eye_distance)
    face = np.nanmean(points, axis=0)
    sharp, colours = np.full(len(points), np.nan), np.full((len(points), 3), np.nan)
    for index, picture in enumerate(crops):
        if picture is not None:
            sharp[index], colours[index] = sharpness(picture, points[index]), face_colour(picture, face)
    return sharp, colours


def mouth_values(opening: np.ndarray, heard: np.ndarray) -> dict[str, float]:
    """How the mouth's opening (F,) follows the heard one (F,)."""
    low, high = np.nanpercentile(opening, [5, 95])
    closed = opening <= low + CLOSED * (high - low)
    return {
        "slope": slope(opening, heard),
        "follows": correlation(opening, heard),
        "range": spread(opening) / spread(heard),
        "least": low,
        "closes": closed[heard <= np.quantile(heard, HEARD_CLOSED)].mean(),
        "is_low": closed.mean(),
    }


def lid_values(frames: list[np.ndarray], landmarks: np.ndarray, code: np.ndarray | None) -> dict[str, float]:
    """How often lids close, and by how much when the eye code (F,) asks for it."""
    openness = eye_openness(frames, landmarks)
    values = {"blinks_per_second": blinks_per_second(openness)}
    if code is not None:
        blinking = np.flatnonzero(code < SHUT)
        asked = np.split(blinking, np.flatnonzero(np.diff(blinking) > 1) + 1) if len(blinking) else []
        least = [np.nanmin(openness[blink[0] : blink[-1] + 1 + LATE]) for blink in asked]
        values["lids"] = 1 - np.mean(least) / np.nanmedian(openness) if least else np.nan
    return values


def flicker(frames: np.ndarray, landmarks: np.ndarray) -> float:
    """Mean |x_k - (x_(k-1) + x_(k+1)) / 2| of frames (F, H, W, 3) outside the mouth; a steady motion hardly counts."""
    x = frames.astype(np.float32)
    change = np.abs(x[1:-1] - (x[:-2] + x[2:]) / 2).mean(axis=(0, 3))  # (H, W)
    boxes = mouth_box(landmarks[np.isfinite(landmarks).all(axis=(1, 2))], frames.shape[1])
    (x0, y0), (x1, y1) = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    change[y0:y1, x0:x1] = np.nan
    return float(np.nanmean(change))


# ---- Output ----


def table(rows: dict[str, dict[str, float]]) -> str:
    shown = {heading: name for heading, name in COLUMNS.items() if any(name in row for row in rows.values())}
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{heading:>{max(8, len(heading) + 2)}}" for heading in shown)]
    for title, row in rows.items():
        texts = (f"{row[name]:.3f}" if name in row else "-" for name in shown.values())
        cells = (f"{text:>{max(8, len(heading) + 2)}}" for text, heading in zip(texts, shown, strict=True))
        lines.append(f"{title:<{width}}" + "".join(cells))
    return "\n".join(lines)


def contact_sheet(faces: dict[str, np.ndarray], made: list[list[np.ndarray]], speech: Path) -> np.ndarray:
    """RGB: a row of each photo and of frames of its video, and the loudness at the bottom."""
    rows = []
    for face, frames in zip(faces.values(), made, strict=True):
        shown = np.linspace(0, len(frames) - 1, SHEET_COLUMNS - 1).round().astype(int)
        rows.append(np.concatenate([face, *(frames[i] for i in shown)], axis=1))
    size = len(rows[0])
    loudness = envelope(speech, len(made[0]), (SHEET_COLUMNS - 1) * size, size // 4)
    return np.concatenate([*rows, np.pad(loudness, [(0, 0), (size, 0), (0, 0)])])


if __name__ == "__main__":
    typer.run(main)
