"""`dheads prepare`: raw videos and photos to a dataset that `dheads train` reads."""

from __future__ import annotations

import json
import logging
import re
import tomllib
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from dheads.config import FPS, Config, preset, toml_text
from dheads.dataset.clip_worker import Finished, finished, start_worker
from dheads.dataset.contact_sheet import write_contact_sheet
from dheads.dataset.dataset import dataset_info
from dheads.dataset.layouts import NAMESAKE, find_sources
from dheads.dataset.manifest import Clip, FailedTable, Shard, shard_path, standing_splits, write_clips
from dheads.dataset.released_layout import RELEASED
from dheads.dataset.sources import Source
from dheads.errors import DheadsError
from dheads.system.devices import described
from dheads.system.distributed import World, world
from dheads.system.files import complete_or_absent, unfinished_in
from dheads.system.workers import cores, run

log = logging.getLogger("dheads")
# By landmark detector. FAN keeps a GPU busy; with the mesh, which runs on the CPU, only the speech encoder uses the
# GPU, little, but every process takes half a gigabyte of its memory.
_WORKERS_PER_GPU = {"fan": 4, "mesh": 16}
_DIED = "its worker process died (a crash of the decoder, or out of memory)"


@dataclass(frozen=True)
class Summary:
    """The prepared dataset after this run and all before it."""

    clips: int
    frames: int
    seconds: float
    speakers: int
    layout: str
    path: Path
    contact_sheet: Path | None  # None where there is no clip
    failed: list[tuple[str, str]] = field(default_factory=list)  # (source, reason)
    drops: dict[str, int] = field(default_factory=dict)  # kind of reason -> number of sources, the most first
    passed_over: dict[str, int] = field(default_factory=dict)  # kind of other files, such as .txt -> their number


def prepare(
    raw: Path | str,
    out: Path | str,
    config: Config,
    *,
    layout: str | None = None,
    split_file: Path | str | None = None,
    shard: Shard | None = None,
    workers: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Summary:
    """Prepare the videos and photos below `raw` into `out`, in the format of dheads.dataset.dataset.

    Finished clips are kept, so that a run that was killed continues where it stopped. A file that cannot be used is
    listed in failed.csv with the reason, and is not tried again while it is listed.

    layout, split_file: as in `find_sources`. shard: (3, 16) prepares the third of 16 parts; under torchrun every
    process prepares its own. workers: processes; 0: one a core, with an upper limit for each GPU.

    Raises DheadsError where nothing can be prepared, and where `out` cannot be written.
    """
    here, raw, out = world(), Path(raw), Path(out)
    layout, sources, namesakes, passed_over = find_sources(raw, layout, split_file, standing_splits(out))
    if (shard := here.own_shard(shard)) is not None:
        own = slice(shard[0] - 1, None, shard[1])
        sources, namesakes = sources[own], dict(list(namesakes.items())[own])
    _check_import(layout, config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_info(out, config, layout)
    except OSError as error:
        raise DheadsError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    failed = FailedTable(out, shard, (source.name for source in sources))
    # The table's namesakes are those of an earlier run: the other file may be gone since.
    failed.reasons = {name: why for name, why in failed.reasons.items() if not why.startswith(NAMESAKE)} | namesakes
    done = {source.clip: clip for source in sources if (clip := finished(out, source.clip))}
    todo = [source for source in sources if source.clip not in done and source.name not in failed.reasons]
    _delete_unfinished(out, todo)

    devices = _devices(device, here)
    count = workers or _worker_count(config, devices, here)
    log.info("prepare %d clips %s, %d at once; %d are there already", len(todo), _where(devices), count, len(done))
    results = run(partial(start_worker, raw, out, config, layout, devices, progress), todo, count)
    total = len(sources)
    bar = tqdm(total=total, initial=total - len(todo), desc=f"prepare ({layout})", unit="clip", disable=not progress)
    with bar, closing(results):
        for source, result in results:
            if isinstance(result, Finished):
                done[source.clip] = result
            else:
                failed.add(source.name, result if isinstance(result, str) else _DIED)
            bar.update()
    failed.finish()
    if not done and shard is None:
        raise DheadsError(f"{raw}: none of its {total} files could be prepared; {failed.path} says why")
    clips = [_row(source, done[source.clip]) for source in sources if source.clip in done]
    write_clips(out, clips, shard)
    sheet = write_contact_sheet(out, clips, shard_path(out, "contact-sheet.png", shard)) if clips else None
    return _summary(out, layout, clips, sheet, failed, passed_over)


def _row(source: Source, clip: Finished) -> Clip:
    sync = () if clip.sync is None else (round(1000 * clip.sync.offset_seconds, 1), round(clip.sync.correlation, 3))
    return Clip(source.clip, source.speaker, source.split, clip.frames, source.name, *sync)


def _summary(
    out: Path, layout: str, clips: list[Clip], sheet: Path | None, failed: FailedTable, passed_over: dict[str, int]
) -> Summary:
    frames = sum(clip.frames for clip in clips)
    reasons = sorted(failed.reasons.items())
    return Summary(
        clips=len(clips),
        frames=frames,
        seconds=frames / FPS,
        speakers=len({clip.speaker for clip in clips}),
        layout=layout,
        path=out,
        contact_sheet=sheet,
        failed=reasons,
        drops=dict(Counter(_kind(reason) for _, reason in reasons).most_common()),
        passed_over=passed_over,
    )


def _kind(reason: str) -> str:
    """A reason without its numbers and its advice, by which reasons are counted."""
    return re.sub(r"\d+(\.\d+)?", "N", reason.partition(";")[0])


# --- Clips to prepare, and the processes that do


def _delete_unfinished(out: Path, todo: list[Source]) -> None:
    """Delete the temporary files that killed workers left of these clips; other shards may be writing theirs."""
    ours = {source.clip for source in todo}
    for folder in {clip.rpartition("/")[0] for clip in ours}:
        for path, name in unfinished_in(out / "clips" / folder):
            if f"{folder}/{name.rpartition('.')[0]}" in ours:
                path.unlink(missing_ok=True)


def _devices(device: str, here: World) -> list[str]:
    """The devices that workers use in turn: all GPUs, but under torchrun this process's own."""
    if device != "cuda":
        return [device]
    if here.size > 1:
        return [str(here.device(device))]
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def _where(devices: list[str]) -> str:
    more = f" and {len(devices) - 1} more" if len(devices) > 1 else ""
    return described(torch.device(devices[0])) + more


def _worker_count(config: Config, devices: list[str], here: World) -> int:
    own = max(1, cores() // here.local_size)
    on_gpus = devices[0].startswith("cuda")
    return min(own, _WORKERS_PER_GPU[config.alignment.landmarks] * len(devices)) if on_gpus else own


# --- dataset.toml


def _check_import(layout: str, config: Config) -> None:
    """Raises DheadsError where clips of the released layout are to be prepared with other than the paper's presets.

    The authors aligned and encoded these clips themselves, as those presets describe. So dataset.toml names that
    alignment and that encoder, and training with any other refuses the clips.
    """
    if layout != RELEASED:
        return
    theirs, cond = preset("crema"), config.conditioning
    expected = (theirs.alignment, theirs.conditioning.speech_encoder, theirs.conditioning.speech_dim)
    if (config.alignment, cond.speech_encoder, cond.speech_dim) != expected:
        raise DheadsError(
            f"clips of the layout {layout!r} are aligned and encoded as the presets crema and lrw say; choose one of "
            "these with --preset"
        )


def _write_info(out: Path, config: Config, layout: str) -> None:
    """Write dataset.toml. Raises DheadsError where one exists that describes other clips; OSError where it fails."""
    info = {**dataset_info(config), "layout": layout, "preparation": asdict(config.preparation)}
    info = json.loads(json.dumps(info))  # tuples become lists, as in a file that was read
    path = out / "dataset.toml"
    if path.exists():
        try:
            present = tomllib.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise DheadsError(f"{path}: cannot be read ({error}); choose another --out") from error
        for key, value in info.items():
            if present.get(key) != value:
                raise DheadsError(
                    f"{out}: holds clips prepared with {key} = {present.get(key)!r}, not {value!r}; "
                    "choose another --out"
                )
        return
    note = "The licence of these clips is that of the recordings they were made from."
    info |= {"preset": config.name, "licence_note": note}
    with complete_or_absent(path) as part:  # other shards may write the same file now
        part.write_text(toml_text(info), encoding="utf-8")
