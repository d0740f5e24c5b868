"""The layout that the authors' training code reads: aligned videos with their sound, landmarks and embeddings."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from dheads.dataset.sources import Source, entries, safe_name, subfolder
from dheads.dataset.splits import SPLITS, split_speakers
from dheads.errors import DheadsError

RELEASED = "released"  # the layout's name


def looks_released(raw: Path) -> bool:
    """Whether `raw` has the layout's folder of videos and one of its lists."""
    return subfolder(raw, "video") is not None and bool(_file_lists(raw))


def find_released(raw: Path, standing: Mapping[str, str]) -> list[Source]:
    """Every clip that the lists name. Where there is no list for validation, some training speakers are held out.

    standing: the earlier splits of speakers. Raises DheadsError for another layout, and for lists that cannot be used.
    """
    pictures, lists = subfolder(raw, "video"), _file_lists(raw)
    if pictures is None or not lists:
        raise DheadsError(
            f"{raw}: has no folder video with a file_list_train.txt or file_list_test.txt next to it, so the released "
            "code cannot read it; give the folder that holds them, or another layout"
        )
    splits = _read_lists(lists)
    folders = {name: name.partition("/")[0] for name in splits}
    # Folders are speakers unless one is in several lists, as in LRW, whose folders are words.
    in_list = {(folder, splits[name]) for name, folder in folders.items()}
    are_speakers = len(in_list) == len(set(folders.values()))
    parts = {
        "sound": (subfolder(raw, "audio"), "wav"),
        "landmarks": (subfolder(raw, "lmks"), "npy"),
        "embeddings": (_embeddings_folder(raw), "pth"),
    }
    sources = []
    for name, split in splits.items():
        folder, _, rest = name.partition("/")
        clip = f"{safe_name(folder)}/{safe_name(rest or folder)}"
        # If the folder exists, it must hold a file for every clip; a missing one is an error when the clip is prepared.
        files = {part: f"{below}/{name}.{ending}" for part, (below, ending) in parts.items() if below}
        speaker = sys.intern(folder) if are_speakers else clip
        sources.append(Source(f"{pictures}/{name}.mp4", clip, speaker, split, **files))
    return sources if "val" in lists else _with_val(sources, standing)


def _with_val(sources: list[Source], standing: Mapping[str, str]) -> list[Source]:
    """A tenth of the training speakers held out; never the test set, which the released code validated on."""
    speakers = sorted({source.speaker for source in sources if source.split == "train"})
    splits = split_speakers(speakers, standing, {"val": 0.1})
    return [replace(source, split=splits[source.speaker]) if source.split == "train" else source for source in sources]


def _file_lists(raw: Path) -> dict[str, Path]:
    """split -> its list."""
    lists = {split: raw / f"file_list_{split}.txt" for split in SPLITS}
    return {split: path for split, path in lists.items() if os.path.isfile(path)}


def _read_lists(lists: dict[str, Path]) -> dict[str, str]:
    """Every listed name, without its ending -> its split."""
    splits: dict[str, str] = {}
    for split, path in lists.items():
        try:
            with path.open(encoding="utf-8-sig") as lines:
                for line in filter(None, map(str.strip, lines)):
                    name = _listed_name(line, path)
                    if splits.setdefault(name, split) != split:
                        raise DheadsError(f"{path}: {line} is in {lists[splits[name]].name} too; choose one")
        except (OSError, UnicodeDecodeError) as error:
            raise DheadsError(f"{path}: cannot be read ({error}); it must list one clip a line") from error
    if not splits:
        raise DheadsError(f"{', '.join(map(str, lists.values()))}: no clip is listed; write one a line")
    return splits


def _listed_name(line: str, path: Path) -> str:
    """A line's path without the ending, and without the ./ with which the authors' lines begin."""
    name = PurePosixPath(line)
    # A backslash separates folders on Windows.
    if name.is_absolute() or ".." in name.parts or not name.name or set(line) & set("\\\0"):
        raise DheadsError(f"{path}: {line!r} is no path within the folder video; correct that line")
    return str(name.with_suffix(""))


def _embeddings_folder(raw: Path) -> str | None:
    folders = sorted(e.name for e in entries(raw) if "audio_emb" in e.name.lower() and os.path.isdir(e.path))
    if len(folders) > 1:
        raise DheadsError(f"{raw}: has several folders of speech embeddings, {', '.join(folders)}; keep one in it")
    return folders[0] if folders else None
