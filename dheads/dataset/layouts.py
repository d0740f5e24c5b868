"""Layouts of raw corpora: which clips they hold, who speaks in them, and which are held out."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

from dheads.dataset.released_layout import RELEASED, find_released, looks_released
from dheads.dataset.sources import Source, check_folder, entries, files, safe_name, stem_of, subfolder
from dheads.dataset.split_table import assign_splits
from dheads.dataset.splits import SPLITS, hash_order, split_speakers
from dheads.errors import DheadsError
from dheads.media.photos import PHOTOS
from dheads.media.reading import VIDEOS

NAMESAKE = "has the same name as another file"  # the begin of the reason why such a file is left out
LAYOUTS = ("crema", "lrw", RELEASED, "folder")

# The paper's test actors (section 4.1); CREMA-D numbers its 91 actors from 1001.
_CREMA_TEST = frozenset(str(1000 + actor) for actor in (15, 20, 21, 30, 33, 52, 62, 81, 82, 89))
_CREMA_OTHERS = [actor for actor in map(str, range(1001, 1092)) if actor not in _CREMA_TEST]
_CREMA_VAL_ACTORS = 8


class Corpus(NamedTuple):
    """The content of a raw folder."""

    layout: str  # one of LAYOUTS
    sources: list[Source]  # sorted by clip
    namesakes: dict[str, str]  # pictures that would be the same clip as another -> the reason to leave them out
    passed_over: dict[str, int]  # kinds of other files, such as .txt -> their number


def detect_layout(raw: Path) -> str:
    """The layout, one of LAYOUTS, that `raw` looks like. Raises DheadsError where `raw` is not a folder."""
    check_folder(raw)
    if looks_released(raw):
        return RELEASED
    if subfolder(raw, "VideoFlash"):
        return "crema"
    return "lrw" if _looks_like_lrw(raw) else "folder"


def find_sources(
    raw: Path | str,
    layout: str | None = None,
    split_file: Path | str | None = None,
    standing: Mapping[str, str] | None = None,
) -> Corpus:
    """Every clip in `raw`, in the given layout or, without one, in the layout that is detected.

    crema: CREMA-D as its authors ship it, VideoFlash/ and AudioWAV/; the paper's test actors.
    lrw: LRW as it unpacks, WORD/{train,val,test}/*.mp4, perhaps in lipread_mp4/; the corpus' own splits.
    released: the layout of the authors' training code: video/, audio/, lmks/, file_list_*.txt and *audio_emb*/.
    folder: any tree of videos and photos; the speaker is the first folder level, or a loose file's name.

    split_file: a CSV with the columns clip (the picture's path below `raw`), speaker and split. Its speakers and
    splits replace the layout's, and clips that it does not name are left out.
    standing: the earlier splits of speakers, which they keep unless the corpus or that file fixes them.

    Hidden files and folders are skipped, and so are links to folders, which may form loops. Of files that would be
    the same clip, such as a video and its thumbnail, one is taken, a video before a photo.

    Raises DheadsError where there is nothing to prepare.
    """
    raw = Path(raw)
    check_folder(raw)
    layout = layout or detect_layout(raw)
    if layout not in _FINDERS:
        raise DheadsError(f"there is no layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    skipped: Counter[str] = Counter()
    sources = _FINDERS[layout](raw, skipped, standing or {})
    if split_file is not None:
        sources = assign_splits(sources, raw, Path(split_file))
    clips: dict[str, Source] = {}
    namesakes = {}
    for source in sorted(sources, key=_preference):
        taken = clips.setdefault(source.clip, source)
        if taken is not source:
            namesakes[source.name] = f"{NAMESAKE}; {taken.name} is taken, so rename it to have both"
    return Corpus(layout, list(clips.values()), namesakes, dict(skipped.most_common()))


def _preference(source: Source) -> tuple[str, bool, str]:
    return source.clip, os.path.splitext(source.name)[1].lower() in PHOTOS, source.name


# --- CREMA-D


def _find_crema(raw: Path, skipped: Counter[str]) -> list[Source]:
    pictures = subfolder(raw, "VideoFlash")
    if pictures is None:
        raise DheadsError(f"{raw}: has no folder VideoFlash, so it is not CREMA-D; give its folder, or another layout")
    sounds = subfolder(raw, "AudioWAV")
    wavs = {stem_of(name): name for name in files(raw, sounds, {".wav"}, Counter())} if sounds else {}
    # The paper names no actors for validation. These are fixed, whichever part of the corpus `raw` holds; their number
    # is the released configuration's n_test_actors.
    val = hash_order(_CREMA_OTHERS)[:_CREMA_VAL_ACTORS]
    splits = dict.fromkeys(val, "val") | dict.fromkeys(_CREMA_TEST, "test")
    sources = []
    for name in files(raw, pictures, VIDEOS, skipped):
        stem = stem_of(name)
        if not re.match("[0-9]{4}_", stem):
            raise DheadsError(f"{raw / name}: is not named as in CREMA-D, such as 1001_DFA_ANG_XX; rename or remove it")
        actor = sys.intern(stem[:4])
        clip = f"{actor}/{safe_name(stem)}"
        sources.append(Source(name, clip, actor, splits.get(actor, "train"), sound=wavs.get(stem)))
    if not sources:
        raise DheadsError(f"{raw / pictures}: holds no video; known endings are {', '.join(sorted(VIDEOS))}")
    return sources


# --- LRW


def _find_lrw(raw: Path, skipped: Counter[str]) -> list[Source]:
    base = subfolder(raw, "lipread_mp4") or ""
    depth = 4 if base else 3
    sources = []
    for name in files(raw, base, VIDEOS, skipped):
        parts = name.split("/")
        if len(parts) != depth or parts[-2] not in SPLITS:
            skipped["videos in no WORD/SPLIT/"] += 1
            continue
        word, split, file = parts[-3:]
        clip = f"{safe_name(word)}/{split}_{safe_name(stem_of(file))}"  # the splits use the same numbers
        # The corpus does not name its speakers. Each clip counts as a speaker of its own: if each word were a speaker,
        # balancing by speakers would treat its thousand people as one.
        sources.append(Source(name, clip, clip, sys.intern(split)))
    if not sources:
        raise DheadsError(
            f"{raw}: has no videos such as ABOUT/train/ABOUT_00001.mp4, so it is not LRW; give the folder of its "
            "words, or another layout"
        )
    return sources


def _looks_like_lrw(raw: Path) -> bool:
    """Whether every folder is an upper-case word and holds a split."""
    if subfolder(raw, "lipread_mp4"):
        return True
    words = (_is_word(entry) for entry in entries(raw) if os.path.isdir(entry.path))
    return next(words, False) and all(words)


def _is_word(folder: os.DirEntry[str]) -> bool:
    return folder.name.isupper() and any(os.path.isdir(os.path.join(folder.path, split)) for split in SPLITS)


# --- Any folder


def _find_in_folder(raw: Path, skipped: Counter[str], standing: Mapping[str, str]) -> list[Source]:
    names = list(files(raw, "", VIDEOS | PHOTOS, skipped))
    if not names:
        raise DheadsError(
            f"{raw}: holds no video or photo (links to folders are not followed); known endings are "
            f"{', '.join(sorted(VIDEOS | PHOTOS))}"
        )
    speakers = [sys.intern(name.partition("/")[0] if "/" in name else stem_of(name)) for name in names]
    splits = split_speakers(sorted(set(speakers)), standing)
    return [
        Source(name, f"{safe_name(speaker)}/{safe_name(name.rpartition('.')[0])}", speaker, splits[speaker])
        for name, speaker in zip(names, speakers, strict=True)
    ]


# From the raw folder, the count of skipped files and the earlier splits of speakers.
_Finder: TypeAlias = Callable[[Path, "Counter[str]", Mapping[str, str]], list[Source]]
_FINDERS: dict[str, _Finder] = {
    "crema": lambda raw, skipped, standing: _find_crema(raw, skipped),
    "lrw": lambda raw, skipped, standing: _find_lrw(raw, skipped),
    RELEASED: lambda raw, skipped, standing: find_released(raw, standing),
    "folder": _find_in_folder,
}
