"""Raw corpora: which clips they hold, who speaks in them, and which are held out."""

from __future__ import annotations

import csv
import hashlib
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dheads.dataset.splits import SPLITS, hash_order, split_speakers
from dheads.errors import DheadsError
from dheads.media.photos import PHOTOS
from dheads.media.reading import VIDEOS

NAMESAKE = "has the same name as another file"  # how the reason begins why such a file is left out
LAYOUTS = ("crema", "lrw", "released", "folder")

# The paper's test actors (section 4.1); CREMA-D numbers its 91 actors from 1001.
_CREMA_TEST = frozenset(str(1000 + actor) for actor in (15, 20, 21, 30, 33, 52, 62, 81, 82, 89))
_CREMA_OTHERS = [actor for actor in map(str, range(1001, 1092)) if actor not in _CREMA_TEST]
_CREMA_VAL_ACTORS = 8
_NAME_BYTES = 180  # of one path component; file systems allow 255, and endings and temporary names add to it

_log = logging.getLogger("dheads")


@dataclass(frozen=True, slots=True)
class Source:
    """One raw clip and where it belongs. Paths are posix paths below the raw folder."""

    name: str  # of the picture, a video or a photo
    clip: str  # <folder>/<name>, unique, and harmless as a path
    speaker: str
    split: str  # train, val or test
    sound: str | None = None  # where it is a file of its own, not the video's
    landmarks: str | None = None  # .npy (F, 68, 2 or 3), px of the video
    embeddings: str | None = None  # .pth (F, D)


class Corpus(NamedTuple):
    """What a raw folder holds."""

    layout: str  # one of LAYOUTS
    sources: list[Source]  # sorted by clip
    namesakes: dict[str, str]  # by name: why a picture is left out that would be the same clip as another
    passed_over: dict[str, int]  # how many files are nothing to prepare, by their kind, such as .txt


def detect_layout(raw: Path) -> str:
    """The layout, one of LAYOUTS, that the folders in `raw` look like. Raises DheadsError when `raw` is no folder."""
    _check_folder(raw)
    if _subfolder(raw, "video") and _file_lists(raw):
        return "released"
    if _subfolder(raw, "VideoFlash"):
        return "crema"
    return "lrw" if _looks_like_lrw(raw) else "folder"


def find_sources(
    raw: Path | str,
    layout: str | None = None,
    split_file: Path | str | None = None,
    standing: Mapping[str, str] | None = None,
) -> Corpus:
    """Every clip in `raw`, whose layout is found by looking unless it is given.

    crema: CREMA-D as its authors ship it, VideoFlash/ and AudioWAV/; the paper's test actors.
    lrw: LRW as it unpacks, WORD/{train,val,test}/*.mp4, perhaps in lipread_mp4/; the corpus' own splits.
    released: what the authors' training code reads: video/, audio/, lmks/, file_list_*.txt and *audio_emb*/.
    folder: any tree of videos and photos; the speaker is the first folder level, or a loose file's name.

    split_file: a CSV with the columns clip (the picture's path below `raw`), speaker and split. Its speakers and
    splits replace the layout's, and clips that it does not name are left out.
    standing: splits that speakers were given before, and keep where neither the corpus nor that file fixes them.

    Hidden files and folders are passed over; so are links to folders, which may go round in circles. Of files that
    would be the same clip, such as a video and its thumbnail, one is taken, a video before a photo.

    Raises DheadsError when there is nothing to prepare.
    """
    raw = Path(raw)
    _check_folder(raw)
    layout = layout or detect_layout(raw)
    if layout not in _FINDERS:
        raise DheadsError(f"there is no layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    others: Counter[str] = Counter()
    sources = _FINDERS[layout](raw, others, standing or {})
    if split_file is not None:
        sources = _assigned(sources, raw, Path(split_file))
    clips: dict[str, Source] = {}
    namesakes = {}
    for source in sorted(sources, key=_preference):
        taken = clips.setdefault(source.clip, source)
        if taken is not source:
            namesakes[source.name] = f"{NAMESAKE}; {taken.name} is taken, so rename it to have both"
    return Corpus(layout, list(clips.values()), namesakes, dict(others.most_common()))


def _preference(source: Source) -> tuple[str, bool, str]:
    return source.clip, os.path.splitext(source.name)[1].lower() in PHOTOS, source.name


# --- The layouts


def _crema(raw: Path, others: Counter[str], _: Mapping[str, str]) -> list[Source]:
    pictures = _subfolder(raw, "VideoFlash")
    if pictures is None:
        raise DheadsError(f"{raw}: has no folder VideoFlash, so it is not CREMA-D; give its folder, or another layout")
    sounds = _subfolder(raw, "AudioWAV")
    wavs = {_stem(name): name for name in _files(raw, sounds, {".wav"}, Counter())} if sounds else {}
    # The paper names no actors for validation. These are fixed, whichever part of the corpus is there; as many as
    # the released configuration's n_test_actors.
    val = hash_order(_CREMA_OTHERS)[:_CREMA_VAL_ACTORS]
    splits = dict.fromkeys(val, "val") | dict.fromkeys(_CREMA_TEST, "test")
    sources = []
    for name in _files(raw, pictures, VIDEOS, others):
        stem = _stem(name)
        if not re.match("[0-9]{4}_", stem):
            raise DheadsError(f"{raw / name}: is not named as in CREMA-D, such as 1001_DFA_ANG_XX; rename or remove it")
        actor = sys.intern(stem[:4])
        clip = f"{actor}/{_safe(stem)}"
        sources.append(Source(name, clip, actor, splits.get(actor, "train"), sound=wavs.get(stem)))
    if not sources:
        raise DheadsError(f"{raw / pictures}: holds no video; known endings are {', '.join(sorted(VIDEOS))}")
    return sources


def _lrw(raw: Path, others: Counter[str], _: Mapping[str, str]) -> list[Source]:
    base = _subfolder(raw, "lipread_mp4") or ""
    depth = 4 if base else 3
    sources = []
    for name in _files(raw, base, VIDEOS, others):
        parts = name.split("/")
        if len(parts) != depth or parts[-2] not in SPLITS:
            others["videos in no WORD/SPLIT/"] += 1
            continue
        word, split, file = parts[-3:]
        clip = f"{_safe(word)}/{split}_{_safe(_stem(file))}"  # in each split the numbers begin anew
        # The corpus does not say who speaks. Every clip is a speaker of its own: were a word one, balancing by
        # speakers would take its thousand people for one.
        sources.append(Source(name, clip, clip, sys.intern(split)))
    if not sources:
        raise DheadsError(
            f"{raw}: has no videos such as ABOUT/train/ABOUT_00001.mp4, so it is not LRW; give the folder of its "
            "words, or another layout"
        )
    return sources


def _looks_like_lrw(raw: Path) -> bool:
    """Every folder is an upper-case word and holds a split."""
    if _subfolder(raw, "lipread_mp4"):
        return True
    words = (_is_word(entry) for entry in _entries(raw) if os.path.isdir(entry.path))
    return next(words, False) and all(words)


def _is_word(folder: os.DirEntry[str]) -> bool:
    return folder.name.isupper() and any(os.path.isdir(os.path.join(folder.path, split)) for split in SPLITS)


def _released(raw: Path, others: Counter[str], standing: Mapping[str, str]) -> list[Source]:
    pictures, lists = _subfolder(raw, "video"), _file_lists(raw)
    if pictures is None or not lists:
        raise DheadsError(
            f"{raw}: has no folder video with a file_list_train.txt or file_list_test.txt beside it, so the released "
            "code cannot read it; give the folder that holds them, or another layout"
        )
    splits = _listed(lists)
    folders = {name: name.partition("/")[0] for name in splits}
    # LRW's folders, words, are in every list: they are not speakers.
    in_list = {(folder, splits[name]) for name, folder in folders.items()}
    are_speakers = len(in_list) == len(set(folders.values()))
    parts = {
        "sound": (_subfolder(raw, "audio"), "wav"),
        "landmarks": (_subfolder(raw, "lmks"), "npy"),
        "embeddings": (_embeddings_folder(raw), "pth"),
    }
    sources = []
    for name, split in splits.items():
        folder, _, rest = name.partition("/")
        clip = f"{_safe(folder)}/{_safe(rest or folder)}"
        # Where the folder is there, every clip has a file in it: one that is missing is missed when it is prepared.
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


def _listed(lists: dict[str, Path]) -> dict[str, str]:
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
    """Without the ending, and without the ./ that the authors' lines begin with."""
    name = PurePosixPath(line)
    # A backslash would part folders on Windows.
    if name.is_absolute() or ".." in name.parts or not name.name or set(line) & set("\\\0"):
        raise DheadsError(f"{path}: {line!r} is no path within the folder video; correct that line")
    return str(name.with_suffix(""))


def _embeddings_folder(raw: Path) -> str | None:
    folders = sorted(e.name for e in _entries(raw) if "audio_emb" in e.name.lower() and os.path.isdir(e.path))
    if len(folders) > 1:
        raise DheadsError(f"{raw}: has several folders of speech embeddings, {', '.join(folders)}; keep one in it")
    return folders[0] if folders else None


def _folder(raw: Path, others: Counter[str], standing: Mapping[str, str]) -> list[Source]:
    names = list(_files(raw, "", VIDEOS | PHOTOS, others))
    if not names:
        raise DheadsError(
            f"{raw}: holds no video or photo (links to folders are not followed); known endings are "
            f"{', '.join(sorted(VIDEOS | PHOTOS))}"
        )
    speakers = [sys.intern(name.partition("/")[0] if "/" in name else _stem(name)) for name in names]
    splits = split_speakers(sorted(set(speakers)), standing)
    return [
        Source(name, f"{_safe(speaker)}/{_safe(name.rpartition('.')[0])}", speaker, splits[speaker])
        for name, speaker in zip(names, speakers, strict=True)
    ]


_FINDERS = {"crema": _crema, "lrw": _lrw, "released": _released, "folder": _folder}


# --- A CSV of splits


def _assigned(sources: list[Source], raw: Path, path: Path) -> list[Source]:
    """The sources that the CSV names, with its speakers and splits."""
    rows = _read_splits(path)
    chosen = []
    for source in sources:
        if source.name not in rows:
            continue
        speaker, split = rows.pop(source.name)
        clip = f"{_safe(speaker)}/{source.clip.partition('/')[2]}"
        chosen.append(replace(source, clip=clip, speaker=speaker, split=split))
    if not chosen:
        example = min(source.name for source in sources)
        raise DheadsError(f"{path}: names no file below {raw}; its clips are paths such as {example}")
    if rows:
        _log.warning("%s: %d of its clips are not below %s, such as %s", path, len(rows), raw, min(rows))
    return chosen


def _read_splits(path: Path) -> dict[str, tuple[str, str]]:
    """clip -> (speaker, split)"""
    rows: dict[str, tuple[str, str]] = {}
    speaker_splits: dict[str, str] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark before the first column
            table = csv.DictReader(file)
            for row in table:
                clip, speaker, split = row["clip"], row["speaker"], row["split"]
                if not (clip and speaker):
                    raise DheadsError(f"{path}: line {table.line_num} has no clip or no speaker; fill it in")
                if split not in SPLITS:
                    raise DheadsError(f"{path}: {clip} is in split {split!r}; use train, val or test")
                if speaker_splits.setdefault(speaker, split) != split:
                    raise DheadsError(
                        f"{path}: speaker {speaker} is in {speaker_splits[speaker]} and in {split}; choose one"
                    )
                if rows.setdefault(clip, (sys.intern(speaker), sys.intern(split))) != (speaker, split):
                    raise DheadsError(f"{path}: {clip} has two speakers, {rows[clip][0]} and {speaker}; choose one")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DheadsError(f"{path}: cannot be read ({error}); it must be a CSV with clip, speaker, split") from error
    except KeyError as error:
        raise DheadsError(f"{path}: has no column {error}; it must be a CSV with clip, speaker, split") from error
    return rows


# --- Files and names


def _check_folder(raw: Path) -> None:
    if not os.path.isdir(raw):
        raise DheadsError(f"{raw}: is no folder; give the folder that holds the raw videos")


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, in no order; hidden entries, such as a file system's own, are passed over."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise DheadsError(f"{folder}: cannot be listed ({error.strerror}); make it readable or move it away") from error


def _subfolder(raw: Path, name: str) -> str | None:
    """What the folder of that name is called, in whichever case."""
    return min(
        (e.name for e in _entries(raw) if e.name.lower() == name.lower() and os.path.isdir(e.path)), default=None
    )


def _files(raw: Path, below: str, endings: Collection[str], others: Counter[str]) -> Iterator[str]:
    """The posix paths below `raw` of the files with these endings in the folder `below`, in no order; others are
    counted by their kind.
    """
    folders = [below]
    while folders:
        folder = folders.pop()
        for entry in _entries(raw / folder):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
                continue
            ending = os.path.splitext(entry.name)[1].lower()
            if not os.path.isfile(entry.path):
                others["links to folders" if os.path.isdir(entry.path) else "links to nothing, or pipes"] += 1
            elif ending not in endings:
                others[ending or "files without an ending"] += 1
            else:
                _check_text(raw, name)
                yield name


def _check_text(raw: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:  # POSIX names are bytes, but tables are UTF-8
        raise DheadsError(f"{raw}: the name {name!a} is not UTF-8; rename the file") from error


def _stem(name: str) -> str:
    """The file's name without folders and ending."""
    return name.rpartition("/")[2].rpartition(".")[0]


def _safe(name: str) -> str:
    """A name that is one harmless path component."""
    safe = re.sub(r"[^\w.-]+", "_", name).strip(".") or "_"
    if len(safe.encode()) <= _NAME_BYTES:
        return safe
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{safe.encode()[:_NAME_BYTES].decode(errors='ignore')}_{digest}"
