"""The yardstick: the quality of weights on the held-out clips of a prepared dataset.

    python benchmarks/yardstick.py --weights run/weights.safetensors --data prepared --out figures

Every moving clip of the split is generated from its first frame and its own sound, and compared with the truth; as a
control with another clip's sound; for weights that are given a lip code, with the clip's true code in place of the
predicted one; and for those that are given poses, with the true ones. Then two people speak for 20 seconds, to see what
drifts. The result is a table of the clips and a summary on the screen and, in --out, report.json, summary.md,
contact.png and the videos. A quick look: --limit 3 --frames 50 --drift-seconds 0. Data may be larger than the network's
frames: then videos are made as large.

Head motion is that of the true clips as prepared; with --raw, that of the videos they were prepared from. Data that are
aligned frame by frame need it, as their heads stand still. --identity-net and --pose-net: see networks.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import typer
from networks import HeadPoseNet, IdentityNet, load_networks
from summary import summary
from torch import Tensor
from tqdm import tqdm

from dheads.config import FPS, SAMPLE_RATE, Config
from dheads.dataset.dataset import Dataset
from dheads.dataset.manifest import Clip, clip_path
from dheads.errors import DheadsError
from dheads.evaluation.comparison import compare
from dheads.evaluation.footage import Footage, Recording, shortened, track_face
from dheads.evaluation.measures import slope
from dheads.evaluation.remake import chosen_clips, clip_seed, raw_videos, stage_of
from dheads.evaluation.scoring import mean_values
from dheads.extensions.lips import LipPredictor, centred
from dheads.extensions.pose import reframed, relative
from dheads.faces.alignment import mouth_opening
from dheads.faces.detection import LandmarkBackend
from dheads.faces.landmarks import load_backend
from dheads.media.sound import load_waveform
from dheads.media.writing import write_video
from dheads.sampling.engine import Engine
from dheads.sampling.lockstep import VideoSpec
from dheads.sampling.staging import Stage
from dheads.sampling.talker import adjusted, frames_of
from dheads.speech.encoders import load_speech_encoder
from dheads.speech.sync import correlation
from dheads.system.devices import resolve_device
from dheads.weights.checkpoints import load_model

COLUMNS = {  # heading: (variant, measure)
    "r": ("own", "mouth_correlation"),
    "r control": ("control", "mouth_correlation"),
    "r true code": ("code", "mouth_correlation"),
    "r heard": ("heard", "mouth_correlation"),
    "offset": ("own", "mouth_offset_frames"),
    "range": ("own", "mouth_range_ratio"),
    "range true code": ("code", "mouth_range_ratio"),
    "slope": ("own", "mouth_slope"),
    "sharpness": ("own", "mouth_sharpness"),
    "head range": ("own", "head_range"),
    "head speed": ("own", "head_speed"),
    "identity": ("own", "identity_shape"),
    "(true)": ("own", "true_identity_shape"),
    "blinks/s": ("own", "blinks_per_second"),
    "(true) ": ("own", "true_blinks_per_second"),
}
NAMES = ("clip", "speaker")  # in a row; all else are variants
DRIFT_MEASURES = ("identity_shape", "landmark_drift", "colour_drift", "blinks_per_second", "blink_seconds")
SHEET_COLUMNS = 12
DRIFT_PEOPLE = 2


@dataclass(frozen=True)
class Talker:
    """Weights and settings that all clips share."""

    engine: Engine
    seed: int

    def say(self, take: Take, what: str, speech: Tensor, codes: dict[str, Tensor] | None = None) -> np.ndarray:
        """The take's photo (F, H, W, 3) uint8 with that speech; what: for the bar."""
        seed = clip_seed(self.seed, take.clip)
        video = VideoSpec(take.stage.photo, speech, seed, codes or {}, middle=take.stage.middle)
        frames = frames_of(self.engine, video)
        bar = tqdm(frames, total=len(speech), desc=f"{take.clip.clip}, {what}", unit="frame", leave=False)
        return np.stack([take.stage.finish(frame) for frame in bar])


@dataclass(frozen=True)
class Take:
    """A held-out clip, or its first frames."""

    clip: Clip
    stage: Stage  # of its first frame
    truth: np.ndarray  # (F, H, W, 3) uint8
    speech: Tensor  # (F, D)
    lips: Tensor  # (F, 3) centred measures
    poses: Tensor | None  # (F, 6) relative to the photo's, for weights that are given poses
    sound: Path
    raw: Path | None  # the video that it was prepared from


@dataclass(frozen=True)
class Truth:
    """What a generated clip is compared with."""

    footage: Footage
    moving: Footage  # the head moves in it as it does for a viewer
    networks: list[IdentityNet | HeadPoseNet]
    seen: dict[str, float]  # by the networks, of the truth


def main(
    weights: Annotated[str, typer.Option(help="Name of packaged weights, or a checkpoint.")],
    data: Annotated[Path, typer.Option(help="Dataset made by `dheads prepare`.")],
    out: Annotated[Path | None, typer.Option(help="Folder for report.json, contact.png and the videos.")] = None,
    split: str = "val",
    raw: Annotated[Path | None, typer.Option(help="Folder that the dataset was prepared from.")] = None,
    identity_net: Annotated[Path | None, typer.Option(help="MobileFaceNet, an ONNX file.")] = None,
    pose_net: Annotated[tuple[Path, Path] | None, typer.Option(help="FSA-Net, two ONNX files.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; those of the weights by default.")] = None,
    solver: str | None = None,
    seed: int = 0,
    limit: Annotated[int | None, typer.Option(help="Only so many clips.")] = None,
    frames: Annotated[int | None, typer.Option(help="Only so many frames of each clip.")] = None,
    drift_seconds: Annotated[float, typer.Option(help="Length of the drift test; 0: none.")] = 20.0,
    drift_audio: Annotated[Path | None, typer.Option(help="Its speech; that of the split by default.")] = None,
    device: str = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads to use.")] = None,
) -> None:
    """Measure the quality of weights on the held-out clips of a prepared dataset."""
    if threads:
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
    unet, config, info = load_model(weights, resolve_device(device))
    dataset = Dataset(data)
    dataset.check(config, larger=config.extensions.warp.flow)
    takes = read_takes(dataset, config, split, limit, frames, raw)
    talker = Talker(Engine(unet, adjusted(config, steps=steps, solver=solver)), seed)
    backend = load_backend("mesh")
    networks = load_networks(identity_net, pose_net)

    results, made = [], {}
    for index, take in enumerate(tqdm(takes, desc="clips", unit="clip")):
        variants = speak(talker, take, other_speech(takes, index))
        made[take.clip.clip] = variants["own"]
        truth = read_truth(take, networks, backend)
        result = {name: measure(video, truth, backend, told(talker, take, name)) for name, video in variants.items()}
        if unet.lip_predictor is not None:
            result["heard"] = heard(unet.lip_predictor, take)
        results.append({"clip": take.clip.clip, "speaker": take.clip.speaker, **result})
        if out:
            write_videos(out, take, variants)
    drift = measure_drift(talker, takes, drift_speech(config, takes, drift_seconds, drift_audio), backend, out)

    report = {
        "weights": weights,
        "training": info.get("training"),
        "split": split,
        "sampling": dataclasses.asdict(talker.engine.sampling),
        "extensions": dataclasses.asdict(talker.engine.extensions),
        "seed": seed,
        "mean": {name: mean_values(row[name] for row in results) for name in results[0] if name not in NAMES},
        "clips": results,
        "lost": [f"{row['clip']}: {name}" for row in results for name, values in row.items() if values == {}],
        "drift_seconds": drift_seconds,
        "drift": drift,
    }
    sums = summary([(row["speaker"], row) for row in results])
    print(table(results, report["mean"]), sums, sep="\n\n")
    if report["lost"]:
        print("not in the means, as no face is found:", ", ".join(report["lost"]))
    for row in drift:
        print(drift_line(row, drift_seconds))
    if out:
        (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (out / "summary.md").write_text(sums + "\n", encoding="utf-8")
        cv2.imwrite(str(out / "contact.png"), contact_sheet(takes, made)[..., ::-1])
        print(f"written to {out}")


# ---- Clips ----


def read_takes(
    dataset: Dataset, config: Config, split: str, limit: int | None, frames: int | None, raw: Path | None = None
) -> list[Take]:
    """The videos of a split, at most `limit`, of as many speakers as possible."""
    takes = []
    clips = chosen_clips(dataset, split, limit)
    sources = raw_videos(clips, raw)
    for clip in clips:
        label, truth = dataset.labels(clip), dataset.frames(clip)[:frames]
        moves = config.extensions.warp.flow
        takes.append(
            Take(
                clip,
                stage_of(dataset, clip, config),
                truth,
                label["speech"][:frames],
                centred(label["lips"])[:frames],
                true_poses(label["pose"][:frames]) if moves else None,
                clip_path(dataset.root, clip.clip, "mp4"),
                sources.get(clip.clip),
            )
        )
    return takes


def true_poses(poses: Tensor) -> Tensor:
    """Poses (F, 6) in the crops of a clip -> relative to its first frame's, in the crop that shows it as a photo."""
    return reframed(relative(poses, poses[:1]), poses[:1], torch.tensor(False))


def read_truth(take: Take, networks: list[IdentityNet | HeadPoseNet], backend: LandmarkBackend) -> Truth:
    """Track and measure the true clip. Raises DheadsError if it shows no face."""
    footage = moving = track_face(take.clip.clip, lambda: take.truth, backend)
    if take.raw is not None:
        moving = shortened(track_face(str(take.raw), Recording(take.raw), backend), len(take.truth))
    seen: dict[str, float] = {}
    for network in networks:
        seen |= network.measure(moving if isinstance(network, HeadPoseNet) else footage, footage)
    return Truth(footage, moving, networks, {f"true_{name}": value for name, value in seen.items()})


def other_speech(takes: list[Take], index: int) -> Tensor | None:
    """The embeddings of another speaker, at the length of this clip; None if there is only one speaker."""
    take = takes[index]
    for other in [*takes[index + 1 :], *takes[:index]]:
        if other.clip.speaker != take.clip.speaker:
            return repeated(other.speech, len(take.speech))
    return None


def repeated(speech: Tensor, count: int) -> Tensor:
    """(F, D) -> (count, D), repeated from the start as often as needed."""
    return speech[torch.arange(count) % len(speech)]


def speak(talker: Talker, take: Take, other: Tensor | None) -> dict[str, np.ndarray]:
    """The clip generated with its own sound, another's, with its true lip code, and with its true poses."""
    lips = talker.engine.unet.lip_predictor
    variants = {"own": talker.say(take, "own sound", take.speech)}
    if other is not None:
        variants["control"] = talker.say(take, "control", other)
    if lips is not None:
        code = lips.normalise(take.lips.to(lips.mean.device)).cpu()
        variants["code"] = talker.say(take, "true code", take.speech, {"lips": code})
    if take.poses is not None:
        variants["poses"] = talker.say(take, "true poses", take.speech, {"pose": take.poses})
    return variants


# ---- Measures ----


def measure(
    video: np.ndarray, truth: Truth | None, backend: LandmarkBackend, opening: np.ndarray | None = None
) -> dict[str, float]:
    """The measures of `dheads eval`, or without `truth` those of the video alone; empty if no face is found.

    opening (F,): that of the lip code that the network is given, eye distances.
    """
    try:
        footage = track_face("generated", lambda: video, backend)
    except DheadsError:
        return {}
    if truth is None:
        values = compare(footage, footage).values
        return {name: values[name] for name in DRIFT_MEASURES if name in values}
    values = compare(footage, truth.footage, truth.moving.landmarks).values | truth.seen
    if opening is not None:
        values["mouth_slope"] = slope(mouth_opening(footage.landmarks), opening)
    for network in truth.networks:
        values |= network.measure(footage, truth.footage)
    return values


def told(talker: Talker, take: Take, variant: str) -> np.ndarray | None:
    """The opening (F,) in eye distances that the network is given in a variant, if it is the clip's own."""
    lips = talker.engine.unet.lip_predictor
    if lips is None or variant == "control":
        return None
    opening = take.lips[:, 0] if variant == "code" else lips.opening(take.speech.to(lips.mean.device)).cpu()
    return opening.numpy()


def heard(lips: LipPredictor, take: Take) -> dict[str, float]:
    """How well the lip code predicted from the sound follows the true one: the most that the network can know."""
    predicted = lips.predict(take.speech.to(lips.mean.device)).cpu()
    return {"mouth_correlation": correlation(predicted[:, 0].numpy(), take.lips[:, 0].numpy())}


def drift_speech(config: Config, takes: list[Take], seconds: float, audio: Path | None) -> Tensor:
    """Embeddings (F, D) of `seconds` of speech, from `audio` or the takes."""
    if audio is None:
        speech = torch.cat([take.speech for take in takes])
    else:
        speech = load_speech_encoder(config.conditioning.speech_encoder).encode(load_waveform(audio)).float()
    return repeated(speech, round(seconds * FPS))


def measure_drift(
    talker: Talker, takes: list[Take], speech: Tensor, backend: LandmarkBackend, out: Path | None
) -> list[dict[str, float | str]]:
    """How much the colour and the landmarks of two people change from the first second to the last."""
    rows: list[dict[str, float | str]] = []
    for take in takes[-DRIFT_PEOPLE:] if len(speech) else []:
        name = take.clip.clip
        video = talker.say(take, "drift", speech)
        if out:
            write_video(ready(out / "drift" / f"{name}.mp4"), iter(video), None)
        rows.append({"clip": name, **measure(video, None, backend)})
    return rows


# ---- Output ----


def write_videos(out: Path, take: Take, variants: dict[str, np.ndarray]) -> None:
    """Write generated/, which `dheads eval` can compare with the dataset's clips, and side/ with all variants."""
    name = f"{take.clip.clip}.mp4"
    write_video(ready(out / "generated" / name), iter(variants["own"]), take.sound)
    side = np.concatenate([take.truth, *variants.values()], axis=2)
    write_video(ready(out / "side" / name), iter(side), take.sound)


def ready(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def table(results: list[dict], means: dict) -> str:
    rows = [*results, {"clip": "mean", **means}]
    width = max(len(row["clip"]) for row in rows)
    lines = [" " * width + "".join(f"{heading:>{max(9, len(heading) + 2)}}" for heading in COLUMNS)]
    for row in rows:
        cells = (row.get(variant, {}).get(name) for variant, name in COLUMNS.values())
        texts = ["-" if value is None else f"{value:.2f}" for value in cells]
        lines.append(
            f"{row['clip']:<{width}}"
            + "".join(f"{text:>{max(9, len(heading) + 2)}}" for text, heading in zip(texts, COLUMNS, strict=True))
        )
    return "\n".join(lines)


def drift_line(row: dict, seconds: float) -> str:
    if "colour_drift" not in row:
        return f"{seconds:g} s of {row['clip']}: no face is found"
    return (
        f"{seconds:g} s of {row['clip']}: from the first second to the last, the colour drifts "
        f"{row['colour_drift']:.1f} of 255 and the landmarks {row['landmark_drift']:.3f} eye distances"
    )


def contact_sheet(takes: list[Take], made: dict[str, np.ndarray]) -> np.ndarray:
    """RGB: columns of time and rows of takes, each with the real frames, the generated ones and the loudness."""
    return np.concatenate([part for take in takes for part in _sheet_rows(take, made[take.clip.clip])])


def _sheet_rows(take: Take, video: np.ndarray) -> Iterator[np.ndarray]:
    shown = np.linspace(0, len(video) - 1, SHEET_COLUMNS).round().astype(int)
    for frames in (take.truth, video):
        yield np.concatenate(list(frames[shown]), axis=1)
    yield envelope(take.sound, len(video), SHEET_COLUMNS * video.shape[2], video.shape[1] // 4)


def envelope(sound: Path, frames: int, width: int, height: int) -> np.ndarray:
    """The loudness of a sound over its first `frames` video frames, as a picture (height, width, 3) uint8."""
    waveform = load_waveform(sound)[: frames * SAMPLE_RATE // FPS].numpy()
    loudness = np.array([np.sqrt(np.square(part).mean()) for part in np.array_split(waveform, width)])
    bars = (loudness / max(loudness.max(), 1e-6) * (height - 4)).round()
    filled = np.arange(height)[::-1, None] < bars  # (height, width)
    return np.where(filled[..., None], np.uint8([90, 160, 255]), np.uint8([24, 24, 24]))


if __name__ == "__main__":
    typer.run(main)
