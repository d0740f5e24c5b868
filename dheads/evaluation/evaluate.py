"""`dheads eval`: generated videos compared with the real ones of the same names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from dheads import __version__
from dheads.config import Config
from dheads.dataset.dataset import Dataset
from dheads.dataset.manifest import Clip, clip_path
from dheads.evaluation.instruments import OpeningMeter
from dheads.evaluation.pairs import VideoPair, find_pairs
from dheads.evaluation.remake import chosen_clips, claim, clip_speech, heard_openings, raw_videos, remake
from dheads.evaluation.report import write_report
from dheads.evaluation.results import Facts, Report
from dheads.evaluation.scoring import Scorer
from dheads.extensions.network import ExtendedUNet
from dheads.sampling.engine import Engine
from dheads.sampling.lists import SLOTS
from dheads.sampling.talker import adjusted
from dheads.system.devices import resolve_device
from dheads.system.files import file_sha256
from dheads.weights.checkpoints import load_model
from dheads.weights.fetching import resolve

_STEADY_FRAMES = 100.0  # an alignment that is smoothed over as many frames leaves the head its motion


def evaluate(
    generated: Path | str,
    reference: Path | str,
    *,
    out: Path | str | None = None,
    size: int | None = None,
    limit: int | None = None,
    only: Sequence[str] | None = None,
    table: str | None = None,
    lip_reader: str | None = None,
    words: Path | str | None = None,
    device: str = "cpu",
    workers: int = 0,
    progress: bool = True,
) -> Report:
    """Compare generated videos with real ones: two files, or two folders whose videos have the same names.

    out: folder for report.json, clips.csv and report.html.
    size: side in px at which the videos were generated, if they were enlarged since; frames are compared at the scale
        of the generated ones. (Enlarging and shrinking them again still costs a fifth of the sharpness.)
    limit: only so many videos, the first by name.
    only: measures to take, downloading the weights that they need; by default all that need no download.
    table: "crema" or "lrw", the table of the paper to compare with.
    lip_reader: see `load_lip_reader`.
    words: CSV file with the spoken words, see `read_words`.
    workers: processes, for eight pairs or more; 0: one per core. A script must guard its main part then, as
        multiprocessing demands.

    Videos that cannot be measured are listed in `failed`, measures that cannot be taken in `unavailable`. The same
    videos give the same report.
    Raises DheadsError if there is nothing to compare, if no video can be measured, and if a measure of `only` is not
    available.
    """
    pairs, failed = find_pairs(Path(generated), Path(reference))
    scorer = Scorer(only, table, size, device, lip_reader, words, workers, progress)
    scorer.go_without(OpeningMeter.measures, "needs weights with a lip code, which says how far a mouth should open")
    facts: Facts = {"generated": str(generated), "reference": str(reference)}
    if size:
        facts["size"] = size
    report = scorer.score(pairs[:limit], failed, facts)
    if out is not None:
        write_report(report, out)
    return report


def evaluate_weights(
    weights: Path | str,
    data: Path | str,
    split: str,
    out: Path | str,
    *,
    raw: Path | str | None = None,
    steps: int | None = None,
    solver: str | None = None,
    seed: int = 0,
    slots: int = 0,
    limit: int | None = None,
    only: Sequence[str] | None = None,
    table: str | None = None,
    lip_reader: str | None = None,
    words: Path | str | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: bool = True,
) -> Report:
    """Generate the videos of a split of a prepared dataset, and compare them with the real ones.

    Each clip is generated from its first frame and its sound, into <out>/generated. Existing videos are kept, so an
    interrupted call can be repeated. report.json, clips.csv and report.html are written to `out`.

    raw: the folder that the dataset was prepared from. The motion of real heads is then measured in its videos, for
        datasets whose alignment follows the head and so takes its motion away.
    slots: clips in lock-step; 0: a number that suits the device.
    limit: only so many clips, of as many speakers as possible.
    Other arguments: as for `sample` and `evaluate`.

    Raises DheadsError as these do, if a clip is missing in `raw`, and if `out` holds videos made with other settings.
    """
    weights, data, out = str(weights), Path(data), Path(out)
    scorer = Scorer(only, table, None, device, lip_reader, words, workers, progress)
    model_device = resolve_device(device)
    unet, config, _ = load_model(weights, model_device, progress)
    config = adjusted(config, steps=steps, solver=solver)
    dataset = Dataset(data)
    dataset.check(config, larger=config.extensions.warp.flow)
    clips = chosen_clips(dataset, split, limit)
    sources = raw_videos(clips, raw)
    settings = _settings(config, resolve(weights, progress), dataset, seed, model_device)
    claim(out, settings)
    slots = slots or SLOTS[model_device.type]
    speech = clip_speech(dataset, config, model_device, progress)
    _measure_opening(scorer, unet, clips, speech)
    failed = remake(Engine(unet, config), dataset, clips, speech, out / "generated", seed, slots, progress)
    names = sorted({clip.clip for clip in clips} - {clip for clip, _ in failed})
    made = out / "generated"
    pairs = [VideoPair(name, made / f"{name}.mp4", clip_path(data, name, "mp4"), sources.get(name)) for name in names]
    facts: Facts = {"weights": weights, "split": split, **settings}
    if raw is not None:
        facts["raw"] = str(raw)
    report = scorer.score(pairs, failed, facts)
    if raw is None:
        report.warnings.extend(_still_heads(config.alignment.smooth_frames))
    write_report(report, out)
    return report


def _measure_opening(scorer: Scorer, unet: ExtendedUNet, clips: list[Clip], speech: Callable[[Clip], Tensor]) -> None:
    """Have the scorer measure how far mouths open, if the weights say how far they should."""
    if unet.lip_predictor is None:
        scorer.go_without(OpeningMeter.measures, "the weights have no lip code, which says how far a mouth should open")
    else:
        scorer.add(OpeningMeter(heard_openings(unet.lip_predictor, clips, speech)))


def _settings(config: Config, checkpoint: Path, dataset: Dataset, seed: int, device: torch.device) -> Facts:
    """How the videos are generated."""
    return {
        "checkpoint_sha256": file_sha256(checkpoint),
        "data": str(dataset.root.resolve()),
        "size": dataset.size,
        "seed": seed,
        "device": device.type,
        "dheads": __version__,
        **asdict(config.sampling),
        **asdict(config.extensions.noise),
        "anchor": config.extensions.motion.anchor,
        "favour": config.extensions.warp.favour,
    }


def _still_heads(smooth_frames: float) -> list[str]:
    """A warning if real clips are aligned so that their heads hardly move."""
    if smooth_frames >= _STEADY_FRAMES:
        return []
    return [
        f"the real clips follow the head (alignment.smooth_frames = {smooth_frames:g}), so in them it hardly moves; "
        "give the raw folder (--reference) to compare its motion with what a viewer sees"
    ]
