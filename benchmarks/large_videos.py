"""How sharp videos larger than the network's frames are, on held-out clips that were prepared at their size.

    python benchmarks/large_videos.py PHOTO... --weights small --data data-256 --out large

Every moving clip of the split speaks its own sound from its first frame, its head moved by chance, at the size of the
data: as `dheads sample` makes it and, for comparison ("enlarged"), reduced to the network's size and enlarged. PHOTOs
speak the sound of the first clip.

outside        sharpness (variance of the Laplacian) of the face outside the mouth, as a share of the photo's moved by
               the same pose
mouth          sharpness of the mouth, as a share of the true clip's
flicker        mean change from frame to frame, of 255, of pixels outside the mouth whose place in the photo changes by
               less than 0.05 px
mouth flicker  mean difference of the mouth's pixels from the mean of the frames before and after, as a share of the
               true clip's
identity       similarity of frames to the photo by MobileFaceNet (--identity-net), as a share of what true frames have
seam           with --paste: how much more than in the photo two neighbours differ, of 255, at the border of the crop
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import typer
from networks import IdentityNet
from torch import Tensor
from tqdm import tqdm

from dheads.config import Config
from dheads.dataset.dataset import Dataset
from dheads.dataset.manifest import Clip
from dheads.evaluation.footage import track_face
from dheads.evaluation.recognition import similarity
from dheads.evaluation.scoring import mean_values
from dheads.faces.alignment import align_transforms, apply_transform, invert_transform, mouth_box, scale_of
from dheads.faces.composition import PastedComposition, crop_composition
from dheads.faces.landmarks import load_backend
from dheads.media.writing import write_video
from dheads.sampling.engine import Engine
from dheads.sampling.lockstep import VideoSpec, in_lockstep
from dheads.sampling.portrait import Portrait, find_portrait
from dheads.sampling.staging import resized_frame, staged
from dheads.weights.checkpoints import load_model

STEADY_PX = 0.05  # change of a pixel's place in the photo that counts as none
Frames = list[np.ndarray]


@dataclass(frozen=True, eq=False)
class Source:
    """What one video is made from."""

    portrait: Portrait
    speech: Tensor  # (F, D)
    truth: Frames | None = None  # of the same clip


@dataclass(frozen=True, eq=False)
class Made:
    """One video."""

    source: Source
    layers: Frames
    frames: Frames  # (S, S, 3) uint8


def main(
    data: Annotated[Path, typer.Option(help="Dataset prepared at the size of the videos.")],
    out: Annotated[Path, typer.Option(help="Folder for report.json and the videos.")],
    photos: Annotated[list[Path] | None, typer.Argument(help="Photos that speak the first clip's sound.")] = None,
    weights: str = "small",
    split: str = "val",
    frames: Annotated[int, typer.Option(help="Of a video, at most.")] = 75,
    identity_net: Annotated[Path | None, typer.Option(help="MobileFaceNet, an ONNX file.")] = None,
    seed: int = 0,
) -> None:
    """Measure larger videos."""
    unet, config, _ = load_model(weights)
    dataset, net = Dataset(data), IdentityNet(identity_net) if identity_net else None
    sources = {clip.clip: of_clip(dataset, clip, config, frames) for clip in dataset.split(split) if clip.moves}
    speech = next(iter(sources.values())).speech
    sources |= {f"{photo.parent.name}/{photo.stem}": of_photo(photo, speech, config) for photo in photos or []}
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, float]] = {}
    for name, made in videos(Engine(unet), config, sources, dataset.size, seed):
        write_video(out / f"{name.replace('/', '_')}.mp4", made.frames, None)
        rows[name] = figures(made, config, net)
        print(name, rounded(rows[name]))
    clips = mean_values([rows[name] for name, source in sources.items() if source.truth])
    others = mean_values([rows[name] for name, source in sources.items() if not source.truth])
    print("clips", rounded(clips))
    print("photos", rounded(others))
    report = {"weights": weights, "clips": clips, "photos": others, "videos": rows}
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


def of_clip(dataset: Dataset, clip: Clip, config: Config, most: int) -> Source:
    """A clip's first picture and its own sound."""
    labels, truth = dataset.labels(clip), list(dataset.frames(clip)[:most])
    landmarks = labels["landmarks"][:1].numpy()
    matrix = align_transforms(landmarks, config.alignment, config.network.image_size)[0]
    return Source(Portrait(truth[0], landmarks[0], matrix), labels["speech"][:most], truth)


def of_photo(photo: Path, speech: Tensor, config: Config) -> Source:
    """A photo and another's sound."""
    return Source(find_portrait(photo, config, load_backend("mesh")), speech)


def videos(
    engine: Engine, config: Config, sources: dict[str, Source], size: int, seed: int
) -> Iterator[tuple[str, Made]]:
    """Yield the name of each source and its video of `size` px."""
    stages = [staged(config, source.portrait, size) for source in sources.values()]
    specs = [
        VideoSpec(stage.photo, source.speech, seed + number, middle=stage.middle)
        for number, (stage, source) in enumerate(zip(stages, sources.values(), strict=True))
    ]
    layers: list[Frames] = [[] for _ in specs]
    total = sum(len(source.speech) for source in sources.values())
    for index, frame, last in tqdm(in_lockstep(engine, specs, 8), total=total, unit="frame"):
        layers[index].append(frame)
        if last:
            name, source = list(sources.items())[index]
            yield name, Made(source, layers[index], [stages[index].finish(one) for one in layers[index]])
            layers[index] = []


def figures(made: Made, config: Config, net: IdentityNet | None) -> dict[str, float]:
    """The measures of one video; those without a value are absent."""
    size, side = config.network.image_size, len(made.frames[0])
    moved = [photo_alone(one) for one in made.layers]
    compose = crop_composition(made.source.portrait.picture, made.source.portrait.matrix, size, side)
    photo = [compose(one) for one in moved]
    own = [resized_frame(cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA), side) for frame in made.frames]
    points = track_face("the video", lambda: made.frames, load_backend("mesh")).landmarks
    seen = np.isfinite(points).all((1, 2))
    values = {
        "outside": outside(made.frames, points, seen) / outside(photo, points, seen),
        "outside enlarged": outside(own, points, seen) / outside(photo, points, seen),
        "flicker": steady_change(made.frames, made.layers, points),
    }
    truth = made.source.truth
    if truth is not None:
        true_points = track_face("the clip", lambda: truth, load_backend("mesh")).landmarks
        true_seen = np.isfinite(true_points).all((1, 2))
        true_mouth = mouth(truth, true_points, true_seen)
        values |= {
            "mouth": mouth(made.frames, points, seen) / true_mouth,
            "mouth enlarged": mouth(own, points, seen) / true_mouth,
            "mouth flicker": trembling(made.frames, points) / trembling(truth, true_points),
            "mouth flicker enlarged": trembling(own, points) / trembling(truth, true_points),
        }
        if net is not None:
            first = truth[0], true_points[0]
            values["identity"] = float(
                np.nanmean(similarity(net, made.frames, points, *first))
                / np.nanmean(similarity(net, truth, true_points, *first))
            )
    else:
        values["seam"] = seam(made, config)
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


def photo_alone(layers: np.ndarray) -> np.ndarray:
    """Layers that show nothing but the photo moved."""
    alone = layers.copy()
    alone[..., :5] = 0
    return alone


def _laplacian(frame: np.ndarray) -> np.ndarray:
    found: np.ndarray = cv2.Laplacian(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.CV_64F)
    return found


def _mask(points: np.ndarray, side: int, chosen: np.ndarray | slice, grow: float = 0) -> np.ndarray:
    """(S, S) bool: the hull of these landmarks, grown by a share of the side."""
    mask = np.zeros((side, side), np.uint8)
    cv2.fillConvexPoly(mask, cv2.convexHull(np.rint(points[chosen]).astype(np.int32)), 1)
    if grow:
        mask = cv2.dilate(mask, np.ones((2 * round(grow * side) + 1,) * 2, np.uint8))
    return mask.astype(bool)


def outside(frames: Frames, points: np.ndarray, seen: np.ndarray) -> float:
    """Variance of the Laplacian on the face, outside of mouth and chin and of the eyes."""
    found = []
    for frame, at in zip(np.array(frames)[seen], points[seen], strict=True):
        where = _mask(at, len(frame), slice(None)) & ~_mask(at, len(frame), np.r_[4:13, 48:68], 0.05)
        where &= ~_mask(at, len(frame), slice(36, 48), 0.03)
        found.append(_laplacian(frame)[where].var())
    return float(np.mean(found))


def mouth(frames: Frames, points: np.ndarray, seen: np.ndarray) -> float:
    """Variance of the Laplacian in the box of the mouth."""
    found = []
    for frame, at in zip(np.array(frames)[seen], points[seen], strict=True):
        x0, y0, x1, y1 = mouth_box(at, len(frame))
        found.append(_laplacian(frame)[y0:y1, x0:x1].var())
    return float(np.mean(found))


def trembling(frames: Frames, points: np.ndarray) -> float:
    """Mean difference of the mouth's pixels from the mean of the frames before and after."""
    found = []
    for k in range(1, len(frames) - 1):
        if np.isfinite(points[k]).all():
            x0, y0, x1, y1 = mouth_box(points[k], len(frames[k]))
            before, now, after = (frames[k + d][y0:y1, x0:x1].astype(float) for d in (-1, 0, 1))
            found.append(np.abs(now - (before + after) / 2).mean())
    return float(np.mean(found))


def steady_change(frames: Frames, layers: Frames, points: np.ndarray) -> float:
    """Mean change of pixels outside the mouth and the eyes whose place in the photo stays."""
    found, side = [], len(frames[0])
    for k in range(1, len(frames)):
        if not np.isfinite(points[k]).all():
            continue
        change = np.linalg.norm(layers[k][..., 5:] - layers[k - 1][..., 5:], axis=-1) * side / 2
        stays = cv2.resize(change, (side, side)) < STEADY_PX
        stays &= ~_mask(points[k], side, np.r_[4:13, 48:68], 0.08) & ~_mask(points[k], side, slice(36, 48), 0.05)
        if stays.sum() > 100:
            found.append(np.abs(frames[k].astype(float) - frames[k - 1])[stays].mean())
    return float(np.mean(found)) if found else float("nan")


def seam(made: Made, config: Config) -> float:
    """At the border of the crop in the pasted photo, beyond what the photo moved alone has there."""
    portrait, last = made.source.portrait, config.network.image_size - 1
    picture, matrix = portrait.picture, portrait.matrix
    paste = PastedComposition(picture, matrix, last + 1, config.alignment)
    corners = apply_transform(invert_transform(matrix), np.array([(0, 0), (last, 0), (last, last), (0, last)]))
    border = np.zeros(paste.shape, np.uint8)
    width = max(1, round(4 / scale_of(matrix)))
    cv2.polylines(border, [np.rint(corners).astype(np.int32)], isClosed=True, color=1, thickness=width)
    steps = []
    for one in made.layers[:: max(1, len(made.layers) // 15)]:
        shown, alone = (gradient(paste(which)) for which in (one, photo_alone(one)))
        steps.append(np.abs(shown - alone)[border.astype(bool)].mean())
    return float(np.mean(steps))


def gradient(frame: np.ndarray) -> np.ndarray:
    """(H, W): how much a pixel differs from the one to its right and from the one below it."""
    values = frame.astype(np.float32)
    right = np.abs(np.diff(values, axis=1, append=values[:, -1:])).mean(-1)
    below = np.abs(np.diff(values, axis=0, append=values[-1:])).mean(-1)
    both: np.ndarray = right + below
    return both


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
