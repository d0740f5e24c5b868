"""A Turing test as in the paper: people watch generated and real clips and judge which are real.

The page does not contain the answers. It keeps the votes in the voter's browser, sends nothing, and saves them as a
file.
"""

from __future__ import annotations

import json
import math
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from dheads.errors import DheadsError
from dheads.media.playback import longer_side, write_playable
from dheads.system.files import complete_or_absent, complete_or_absent_folder

GENERATED, REAL = "generated", "real"
_MAX_FILE_BYTES = 1_000_000
_Z = 1.959964  # of the normal distribution, for 95 %
_TOKENS = "/*tokens*/[]"  # in the page: the list of its clips


@dataclass(frozen=True)
class Share:
    """The share of votes that judge a clip real, with Wilson's 95 % interval."""

    real: int
    votes: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Tally:
    """The result of a Turing test."""

    voters: int
    generated: Share
    real: Share


# ---- The page ----


def write_turing_test(
    generated: dict[str, Path], real: dict[str, Path], count: int, folder: Path | str, seed: int
) -> Path:
    """Write a page that shows `count` generated and `count` real videos to `folder`, and its key next to the folder.

    generated, real: videos by name; no name is shown twice if there are enough. All are encoded again in the same way
    (25 fps, no larger than the smallest, without metadata) under random names, so that no file reveals its kind. The
    videos should show the same part of the head, or that reveals it. seed: for the choice of clips.
    Returns the path of the key. Raises DheadsError for too few or unreadable videos, and if the folder or the key
    exists.
    """
    folder = Path(folder)
    key = Path(f"{folder.absolute()}-key.json")
    for path in (folder, key):
        if path.exists():
            raise DheadsError(f"{path} is there already; choose another folder, or move it away")
    chosen = choose(generated, real, count, random.Random(seed))
    side = min(longer_side(path) for _, _, path in chosen)
    test = secrets.token_hex(8)
    tokens = sorted(secrets.token_hex(8) for _ in chosen)
    secrets.SystemRandom().shuffle(chosen)
    answers = {token: {"kind": kind, "clip": clip} for token, (kind, clip, _) in zip(tokens, chosen, strict=True)}
    try:
        with complete_or_absent(key) as unfinished, complete_or_absent_folder(folder) as part:
            for token, (_, _, path) in zip(tokens, chosen, strict=True):
                write_playable(path, part / f"{token}.mp4", side)
            (part / "index.html").write_text(_page(test, tokens), encoding="utf-8")
            unfinished.write_text(json.dumps({"test": test, "clips": answers}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DheadsError(f"cannot write the Turing test to {folder}: {error.strerror}") from error
    return key


def choose(
    generated: dict[str, Path], real: dict[str, Path], count: int, rng: random.Random
) -> list[tuple[str, str, Path]]:
    """(kind, clip, video) of the shown videos; preferably real clips of which the generated video is not shown."""
    if count < 1:
        raise DheadsError(f"a Turing test of {count} clips shows nothing; ask for 1 or more")
    for kind, videos in ((GENERATED, generated), (REAL, real)):
        if len(videos) < count:
            raise DheadsError(f"a Turing test of {count} clips of each kind needs more than {len(videos)} {kind} ones")
    made = rng.sample(sorted(generated), count)
    truth = sorted(rng.sample(sorted(real), len(real)), key=lambda clip: clip in made)[:count]
    return [(GENERATED, clip, generated[clip]) for clip in made] + [(REAL, clip, real[clip]) for clip in truth]


def _page(test: str, tokens: list[str]) -> str:
    page = resources.files("dheads").joinpath("assets", "turing.html").read_text(encoding="utf-8")
    return page.replace("/*test*/", test).replace(_TOKENS, json.dumps(tokens))


# ---- The votes ----


def tally(votes_files: Sequence[Path | str], key: Path | str) -> Tally:
    """Count the votes of all voters, whose single votes are taken as independent.

    Raises DheadsError for a file that is damaged, of another test, or of a voter counted before.
    """
    key = Path(key)
    test, kinds = _read_key(key)
    votes: dict[str, list[bool]] = {GENERATED: [], REAL: []}
    voters: dict[str, Path] = {}
    for path in map(Path, votes_files):
        voter, answers = _read_votes(path, test, kinds)
        if voter in voters:
            raise DheadsError(f"{path} is of the same voter as {voters[voter]}; give each voter's file once")
        voters[voter] = path
        for token, answer in answers.items():
            votes[kinds[token]].append(answer == REAL)
    for kind, found in votes.items():
        if not found:
            raise DheadsError(f"{key.name} counts no vote on a {kind} clip; give the voters' files")
    shares = {kind: _share(sum(found), len(found)) for kind, found in votes.items()}
    return Tally(len(voters), shares[GENERATED], shares[REAL])


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (E. B. Wilson, 1927)."""
    p, n = successes / trials, trials
    # (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    middle = p + _Z**2 / (2 * n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _share(real: int, votes: int) -> Share:
    return Share(real, votes, real / votes, *wilson_interval(real, votes))


def _read_key(path: Path) -> tuple[str, dict[str, str]]:
    """(test, kind of each clip by its token)"""
    content = _read_json(path)
    clips, test = content.get("clips"), content.get("test")
    if not isinstance(test, str) or not isinstance(clips, dict) or not clips:
        raise DheadsError(f"{path} is no key of a Turing test; give the key.json that was written with the test")
    kinds: dict[str, str] = {}
    for token, clip in clips.items():
        kind = clip.get("kind") if isinstance(clip, dict) else None
        if kind not in (GENERATED, REAL):
            raise DheadsError(f"{path} is a damaged key: a clip is neither generated nor real; write the test again")
        kinds[token] = kind
    return test, kinds


def _read_votes(path: Path, test: str, kinds: dict[str, str]) -> tuple[str, dict[str, str]]:
    """(voter, answer by the clip's token)"""
    content = _read_json(path)
    voter, answers = content.get("voter"), content.get("votes")
    if content.get("test") != test:
        raise DheadsError(f"{path} is no votes file of this test; give those that its page saved, or the right key")
    if not isinstance(voter, str) or not isinstance(answers, dict):
        raise DheadsError(f"{path} is a damaged votes file: it lacks the voter or the votes; ask for it again")
    for token, answer in answers.items():
        if token not in kinds or answer not in (GENERATED, REAL):
            raise DheadsError(f"{path} is a damaged votes file: {token[:40]!r} is no clip or no answer; leave it out")
    return voter, answers


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
        content = json.loads(text) if len(text) <= _MAX_FILE_BYTES else None
    except OSError as error:
        raise DheadsError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DheadsError(f"{path} is damaged: it is no JSON file; ask for it again") from error
    if not isinstance(content, dict):
        raise DheadsError(f"{path} is no file of a Turing test; give the key and the votes files")
    return content
