"""`dheads eval`: generated videos compared with the real ones of the same names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dheads import __version__
from dheads.config import Config
from dheads.dataset.dataset import Dataset
from dheads.dataset.manifest import clip_path
from dheads.evaluation.instruments import OpeningMeter
from dheads.evaluation.pairs import VideoPair, find_pairs
from dheads.evaluation.remake import chosen_clips, claim, clip_speech, heard_openings, raw_videos, remake
from dheads.evaluation.report import write_report
from dheads.evaluation.results import Facts, Report
from dheads.evaluation.scoring import Scorer
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
    _measure_openings(scorer, None)
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
    dataset.check(config)
    clips = chosen_clips(dataset, split, limit)
    sources = raw_videos(clips, raw)
    checkpoint = file_sha256(resolve(weights, progress))
    settings = _settings(
        config, checkpoint_sha256=checkpoint, data=str(data.resolve()), seed=seed, device=model_device.type
    )
    claim(out, settings)
    speech = clip_speech(dataset, config, model_device, progress)
    heard = None if unet.lip_predictor is None else heard_openings(unet.lip_predictor, clips, speech)
    _measure_openings(scorer, heard)
    slots, made = slots or SLOTS[model_device.type], out / "generated"
    failed = remake(Engine(unet, config), dataset, clips, speech, made, seed, slots, progress)
    names = sorted({clip.clip for clip in clips}.difference(clip for clip, _ in failed))
    pairs = [VideoPair(name, made / f"{name}.mp4", clip_path(data, name, "mp4"), sources.get(name)) for name in names]
    report = scorer.score(pairs, failed, {"weights": weights, "split": split, "raw": str(raw or ""), **settings})
    report.warnings.extend(_still_heads(config.alignment.smooth_frames) if raw is None else [])
    write_report(report, out)
    return report


def _measure_openings(scorer: Scorer, heard: Callable[[str], np.ndarray] | None) -> None:
    """heard: the opening that the sound of a clip foretells; None without a lip code.

    Raises DheadsError if the measure was asked for by name, and there is no lip code.
    """
    if heard is not None:
        scorer.add(OpeningMeter(heard))
    else:
        reason = "needs weights with a lip code, which says how far a mouth should open"
        scorer.go_without(OpeningMeter.measures, reason)


def _settings(config: Config, **settings: str | int) -> Facts:
    """Everything that decides how videos are generated."""
    return {
        **settings,
        "dheads": __version__,
        **asdict(config.sampling),
        **asdict(config.extensions.noise),
        "anchor": config.extensions.motion.anchor,
    }


def _still_heads(smooth_frames: float) -> list[str]:
    """A warning if real clips are aligned so that their heads hardly move."""
    if smooth_frames >= _STEADY_FRAMES:
        return []
    return [
        f"the real clips follow the head (alignment.smooth_frames = {smooth_frames:g}), so in them it hardly moves; "
        "give the raw folder (--reference) to compare its motion with what a viewer sees"
    ]
