"""`dheads eval`: how generated videos compare with the real ones of the same names, and how well weights talk."""

from __future__ import annotations

import difflib
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from tqdm import tqdm

from dheads import __version__
from dheads.dataset.dataset import Dataset
from dheads.dataset.manifest import clip_path
from dheads.errors import DheadsError
from dheads.evaluation.catalogue import CATALOGUE, PAPER
from dheads.evaluation.instruments import load_instruments
from dheads.evaluation.remake import chosen_clips, claim, heard_speech, remake
from dheads.evaluation.report import ClipReport, Report, write_report
from dheads.evaluation.watching import Watched, in_parallel
from dheads.media.video import VIDEOS
from dheads.sampling.engine import Engine
from dheads.sampling.pipeline import PLACES, chosen
from dheads.system.devices import resolve_device
from dheads.system.files import file_sha256
from dheads.weights.checkpoints import load_model
from dheads.weights.fetching import resolve

_PLACES = 8  # clips made at once on a device that `sample` names no number for
_NAMED = 5  # clips that a warning names
Names = list[tuple[str, Path, Path]]  # (clip, generated, real)
Failures = list[tuple[str, str]]  # (clip, reason)


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
    """Compare videos with the real ones: two files, or two folders whose videos have the same names.

    Every measure is taken that needs no download; those of `only` are the only ones, and fetch what they need. Pictures
    are compared at the scale of the generated ones. Where these were enlarged after they were made, `size` is the side
    in px before that (going there and back still costs a fifth of the sharpness). `limit`: only so many videos, the
    first by name. `table` ("crema", "lrw") puts the paper's rows beside. `lip_reader`, `words`: as `lipreading`
    describes them. `out`: a folder for report.json, clips.csv and report.html. `workers`: processes, for eight pairs or
    more; 0: one a core (a script must then guard its main part, as multiprocessing asks).
    A video that cannot be measured is listed in `failed`, a measure that cannot be taken in `unavailable`. The same
    videos give the same report.
    Raises DheadsError when there is nothing to compare, or nothing could be, or a measure of `only` is not to be had.
    """
    pairs, failed = find_pairs(Path(generated), Path(reference))
    bench = _Bench(only, table, size, device, lip_reader, words and Path(words), workers, progress)
    facts = {"generated": str(generated), "reference": str(reference)} | ({"size": size} if size else {})
    report = bench.score(pairs[:limit], failed, facts)
    if out is not None:
        write_report(report, out)
    return report


def evaluate_weights(
    weights: Path | str,
    data: Path | str,
    split: str,
    out: Path | str,
    *,
    steps: int | None = None,
    solver: str | None = None,
    seed: int = 0,
    places: int = 0,
    limit: int | None = None,
    only: Sequence[str] | None = None,
    table: str | None = None,
    lip_reader: str | None = None,
    words: Path | str | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: bool = True,
) -> Report:
    """Make every moving clip of a prepared dataset's split anew, and compare with the truth.

    A clip is made from its first frame and its own sound, in <out>/generated, `places` clips at once (0: as many as
    suit the device). What is there already is kept, so the same call goes on where it was stopped. `limit`: only so
    many clips, of many people. Writes report.json, clips.csv and report.html to `out`. Other options: as in `sample`
    and `evaluate`.
    Raises DheadsError as these do, and for a folder `out` whose videos were made with other settings.
    """
    weights, data, out = str(weights), Path(data), Path(out)
    bench = _Bench(only, table, None, device, lip_reader, words and Path(words), workers, progress)
    place = resolve_device(device)
    unet, config, _ = load_model(weights, place, progress)
    sampling = chosen(config.sampling, steps=steps, solver=solver)
    replace(config, sampling=sampling)  # raises for steps that cannot be walked
    dataset = Dataset(data)
    dataset.check(config)
    clips = chosen_clips(dataset, split, limit)
    settings = {
        "checkpoint_sha256": file_sha256(resolve(weights, progress)),
        "data": str(data.resolve()),
        "seed": seed,
        "device": place.type,
        "dheads": __version__,
        **asdict(sampling),
    }
    claim(out, settings)
    places = places or PLACES.get(place.type, _PLACES)
    speech = heard_speech(dataset, config, place, progress)
    failed = remake(Engine(unet, sampling), dataset, clips, speech, out / "generated", seed, places, progress)
    lost = {clip for clip, _ in failed}
    names = sorted(clip.clip for clip in clips if clip.clip not in lost)
    pairs = [(name, out / "generated" / f"{name}.mp4", clip_path(data, name, "mp4")) for name in names]
    report = bench.score(pairs, failed, {"weights": weights, "split": split, **settings})
    write_report(report, out)
    return report


def find_pairs(generated: Path, reference: Path) -> tuple[Names, Failures]:
    """Every generated video with the real one of its name, and those without a real one."""
    if generated.is_file() and reference.is_file():
        return [(generated.stem, generated, reference)], []
    ours, real = _videos(generated), _videos(reference)
    pairs = [(name, path, real[name]) for name, path in ours.items() if name in real]
    if not pairs:
        raise DheadsError(f"{generated}: none of its {len(ours)} videos has the name of one in {reference}")
    return pairs, [(name, f"no video of that name in {reference}") for name in ours if name not in real]


def _videos(folder: Path) -> dict[str, Path]:
    """The videos below a folder by their path in it, without the ending."""
    if not folder.is_dir():
        raise DheadsError(f"{folder}: is no folder; give two folders of videos, or two videos")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS and path.is_file())
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def mean_values(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of every measure over the rows that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _checked(only: Sequence[str] | None) -> list[str] | None:
    for name in only or ():
        if name not in CATALOGUE:
            near = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.0)[0]
            raise DheadsError(f"unknown measure {name!r}; did you mean {near}? All: {', '.join(CATALOGUE)}")
    return list(only) if only else None


def _checked_table(table: str | None) -> str | None:
    if table is not None and table not in PAPER:
        raise DheadsError(f"the paper has no table {table!r}; the known ones are {', '.join(PAPER)}")
    return table


# ---- Scoring ----


class _Bench:
    """Everything that is needed to measure one pair of videos after another."""

    def __init__(
        self,
        only: Sequence[str] | None,
        table: str | None,
        size: int | None,
        device: str,
        lip_reader: str | None,
        words: Path | None,
        workers: int,
        progress: bool,
    ) -> None:
        self._only, self._table = _checked(only), _checked_table(table)
        self._size, self._device = size, resolve_device(device)
        self._workers, self._progress = workers, progress
        self._instruments, self._unavailable = load_instruments(only, self._device, lip_reader, words, progress)

    def score(self, names: Names, failed: Failures, facts: dict[str, str | int | float]) -> Report:
        """Raises DheadsError where no pair can be measured."""
        clips: list[ClipReport] = []
        notes = _Notes()
        watched = in_parallel(names, self._size, self._workers)
        for clip, found in tqdm(watched, total=len(names), desc="eval", unit="clip", disable=not self._progress):
            if isinstance(found, Watched):
                clips.append(self._measured(found, notes))
            else:
                failed.append((clip, found))
        if not clips:
            raise DheadsError(f"none of the {len(failed)} videos could be measured; the last: {failed[-1][1]}")
        totals = [instrument.total() for instrument in self._instruments]
        return Report(
            clips,
            {"clips": len(clips), "failed": len(failed), **mean_values(clip.values for clip in clips)}
            | {name: value for values, _ in totals for name, value in values.items()},
            self._unavailable,
            sorted(failed),
            [*notes.lines(len(clips)), *(line for _, lines in totals for line in lines)],
            facts | _software() | {"device": str(self._device)},
            self._table,
        )

    def _measured(self, found: Watched, notes: _Notes) -> ClipReport:
        clip, values = found.pair.clip, dict(found.comparison.values)
        for what, detail in found.notes:
            notes.add(what, f"{clip}: {detail}")
        for instrument in self._instruments:
            try:
                values |= instrument.look(found.pair)
            except DheadsError as error:
                notes.add(f"{', '.join(instrument.measures)} could not be taken", f"{clip}: {error}")
        if self._only is not None:
            wanted = {"frames", *self._only}
            values = {name: value for name, value in values.items() if name.removeprefix("true_") in wanted}
        return ClipReport(clip, values, found.comparison.curves, *found.pair.paths)


class _Notes:
    """What happened to clips, in one line for all clips to which the same happened."""

    def __init__(self) -> None:
        self._clips: dict[str, list[str]] = {}

    def add(self, what: str, clip: str) -> None:
        self._clips.setdefault(what, []).append(clip)

    def lines(self, clips: int) -> list[str]:
        return [
            f"{len(named)} of {clips} clips: {what} ({'; '.join(named[:_NAMED])}{'; ...' if named[_NAMED:] else ''})"
            for what, named in sorted(self._clips.items())
        ]


def _software() -> dict[str, str]:
    return {
        "dheads": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "pyav": av.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }
