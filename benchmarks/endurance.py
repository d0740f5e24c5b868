"""Whether quality holds in a long video: its first seconds against the same seconds of speech much later.

    python benchmarks/endurance.py PHOTO... --speech SOUND --at 60 --at 300 --out endurance

Speech and a pause of digital silence are repeated until the last of the times. Every repetition hears the same, so what
differs is what the network made of its own frames. Told for the first and for those that end at the given times:
sharpness of the mouth, colour and shape of the face against the photo's, how well the mouth follows the lip code that
is predicted from the sound, how far the head moves, how much mouth and head move in the pause against in speech, and
with --identity-net the similarity to the photo by MobileFaceNet.
The videos are written to --out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import torch
import typer
from large_videos import Frames, photo_alone
from networks import IdentityNet
from tqdm import tqdm

from dheads.config import FPS, SAMPLE_RATE
from dheads.evaluation.footage import track_face
from dheads.evaluation.measures import (
    blinks_per_second,
    clip_poses,
    face_colour,
    face_shapes,
    shape_distance,
    sharpness,
)
from dheads.evaluation.recognition import similarity
from dheads.faces.alignment import STABLE, eye_distance, framed, mouth_opening, scaled_transform
from dheads.faces.eyelids import eye_openness
from dheads.faces.landmarks import load_backend
from dheads.media.sound import load_waveform
from dheads.media.writing import write_video
from dheads.sampling.engine import Engine
from dheads.sampling.jobs import Job
from dheads.sampling.lockstep import VideoSpec, in_lockstep
from dheads.sampling.portrait import find_portrait
from dheads.sampling.staging import Stage, staged
from dheads.sampling.talker import Talker, load
from dheads.speech.sync import correlation

SPEECH_SECONDS, PAUSE_SECONDS = 7.5, 2.5
SETTLING = 10  # frames of the pause in which the mouth may still close, and before its end open again
Finished = TypeVar("Finished")


@dataclass(frozen=True)
class Stretch:
    """The measures of one repetition."""

    sharpness: float  # variance of the Laplacian
    colour: float  # distance of the face's mean colour from the photo's, of 255
    shape: float  # distance of the landmarks that speech does not move from the photo's, eye distances
    following: float  # correlation of the mouth's opening with the lip code that is predicted from the sound
    head: float  # standard deviation of the head's position, eye distances
    still_mouth: float  # motion of the mouth in the pause, as a share of that in speech
    still_photo: float  # the same share for the photo moved alone, whose lips never move: what landmarks cannot tell
    still_head: float  # the same of the head: geometric mean of the six pose numbers
    similarity: float  # to the photo; NaN without a network


def main(
    photos: list[Path],
    speech: Annotated[Path, typer.Option(help="Some seconds of speech.")],
    out: Annotated[Path, typer.Option(help="Folder for the videos and report.json.")],
    weights: str = "small",
    at: Annotated[list[int] | None, typer.Option(help="Seconds.", show_default="60")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the weights' own by default.")] = None,
    identity_net: Annotated[Path | None, typer.Option(help="MobileFaceNet, an ONNX file.")] = None,
    still: Annotated[bool, typer.Option("--still", help="As `dheads sample --still`.")] = False,
    size: Annotated[int, typer.Option(help="Side of the videos, px.")] = 256,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Measure how long videos hold."""
    times = at or [60]
    talker = load(weights, device)
    engine = talker.engine(Job(photos[0], speech, out, steps=steps, still=still))
    loop = heard(talker, speech)
    count = round(max(times) * FPS)
    embeddings = loop[torch.arange(count) % len(loop)]
    lips = talker.unet.lip_predictor
    predicted = lips.predict(loop)[:, 0].cpu().numpy() if lips else np.zeros(len(loop))
    stages, faces = zip(*(stage_of(talker, photo, size) for photo in photos), strict=True)
    videos = [VideoSpec(s.photo, embeddings, seed, middle=s.middle) for s in stages]
    made = animate(engine, videos, [partial(with_photo_alone, stage) for stage in stages])
    out.mkdir(parents=True, exist_ok=True)
    net = IdentityNet(identity_net) if identity_net else None
    report = []
    for photo, face, pairs in zip(photos, faces, made, strict=True):
        frames, alone = map(list, zip(*pairs, strict=True))
        write_video(out / f"{photo.stem}.mp4", frames, None)
        ends = (len(loop) / FPS, *times)
        stretches = {int(t): measure(face, frames, alone, round(t * FPS), predicted, net) for t in ends}
        figures = {t: {name: x for name, x in asdict(s).items() if np.isfinite(x)} for t, s in stretches.items()}
        footage = track_face(photo.name, lambda frames=frames: frames, load_backend("mesh"))
        rate = blinks_per_second(eye_openness(frames, footage.landmarks))
        report.append({"photo": photo.name, "blinks_per_second": rate} | figures)
        print(f"{photo.name}: {rate:.2f} blinks/s")
        for seconds, values in figures.items():
            print(f"  to {seconds:>4} s  " + "  ".join(f"{name} {value:.3f}" for name, value in values.items()))
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def heard(talker: Talker, speech: Path) -> torch.Tensor:
    """(F, D): the embeddings of one repetition, with others on either side of it."""
    said = load_waveform(speech)[: round(SPEECH_SECONDS * SAMPLE_RATE)]
    if len(said) < SPEECH_SECONDS * SAMPLE_RATE:
        raise typer.BadParameter(f"must last {SPEECH_SECONDS:g} s", param_hint="--speech")
    once = torch.cat([said, torch.zeros(round(PAUSE_SECONDS * SAMPLE_RATE))])
    frames = len(once) * FPS // SAMPLE_RATE
    return torch.cat(list(talker.hear([once.repeat(3)])))[frames : 2 * frames]


def animate(
    engine: Engine, videos: list[VideoSpec], finishes: Sequence[Callable[[np.ndarray], Finished]]
) -> list[list[Finished]]:
    """What each video's function makes of each of its frames; the videos' speech is (F, D) each."""
    made: list[list[Finished]] = [[] for _ in videos]
    total = sum(len(video.speech) for video in videos)
    for index, frame, _ in tqdm(in_lockstep(engine, videos, min(8, len(videos))), total=total, unit="frame"):
        made[index].append(finishes[index](frame))
    return made


def with_photo_alone(stage: Stage, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The frame of the video, (S, S, 3) uint8, and the photo moved alone; None where the network does not move it."""
    return stage.finish(frame), None if stage.middle is None else stage.finish(photo_alone(frame))


def stage_of(talker: Talker, photo: Path, size: int) -> tuple[Stage, np.ndarray]:
    """How a photo is animated in a video of `size` px, and its crop (size, size, 3) there."""
    portrait, own = find_portrait(photo, talker.config, talker.backend), talker.config.network.image_size
    stage = staged(talker.config, portrait, size)
    return stage, framed(portrait.picture, scaled_transform(portrait.matrix, size / own), size)


def measure(
    photo: np.ndarray,
    frames: Frames,
    alone: list[np.ndarray | None],
    end: int,
    predicted: np.ndarray,
    net: IdentityNet | None,
) -> Stretch:
    """Measure the repetition that ends before frame `end`, against the photo (S, S, 3).

    alone: the photo moved like each frame, without the lips that are drawn; None where the network does not move it.
    """
    shown = [photo, *frames[end - len(predicted) : end]]
    still = [frame for frame in alone[end - len(predicted) : end] if frame is not None]
    landmarks = track_face("the video", lambda: shown, load_backend("mesh")).landmarks
    shapes, opening = face_shapes(landmarks), mouth_opening(landmarks)[1:]
    middle = np.nanmean(landmarks, axis=0)
    colours = np.stack([face_colour(frame, middle) for frame in shown])
    moves = np.abs(np.diff(opening))
    pause = np.zeros(len(moves), bool)
    begin = round(SPEECH_SECONDS * FPS)
    spoken = np.nanmean(moves[:begin])
    pause[begin + SETTLING : -SETTLING] = True
    turns = np.abs(np.diff(clip_poses(landmarks[1:]), axis=0))  # (F - 1, 6)
    turning = np.nanmean(turns[pause], axis=0) / np.nanmean(turns[:begin], axis=0)
    places = landmarks[1:, STABLE].mean(axis=1) / eye_distance(landmarks[1:])[:, None]
    return Stretch(
        float(np.nanmean([sharpness(*pair) for pair in zip(shown[1:], landmarks[1:], strict=True)])),
        float(np.abs(colours[1:].mean(axis=0) - colours[0]).mean()),
        float(np.nanmean(shape_distance(shapes[1:], shapes[0]))),
        correlation(opening[:begin], predicted[:begin]),
        float(np.nanstd(places, axis=0).mean()),
        float(np.nanmean(moves[pause]) / spoken),
        float(np.nanmean(mouth_moves(still)[pause]) / spoken) if still else float("nan"),
        float(np.prod(turning) ** (1 / len(turning))),
        float(np.nanmean(similarity(net, shown[1:], landmarks[1:], photo, landmarks[0]))) if net else float("nan"),
    )


def mouth_moves(frames: Frames) -> np.ndarray:
    """By how much the mouth's opening changes from frame to frame, (F - 1,) eye distances."""
    landmarks = track_face("the photo moved", lambda: frames, load_backend("mesh")).landmarks
    moves: np.ndarray = np.abs(np.diff(mouth_opening(landmarks)))
    return moves


if __name__ == "__main__":
    typer.run(main)
