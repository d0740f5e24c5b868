"""Screening of clips: one face, large enough, in nearly every frame, without jumps, and in step with the sound."""

from __future__ import annotations

import numpy as np

from dheads.config import PreparationConfig
from dheads.errors import DheadsError
from dheads.faces.alignment import fill_gaps
from dheads.speech.sync import Sync

_MAX_GROWTH = 1.25  # how much larger or smaller a face may become from one frame to the next


def screen(landmarks: np.ndarray, config: PreparationConfig) -> np.ndarray:
    """The landmarks (F, 68, 2) px of a clip, with short gaps of NaN rows filled.

    Raises DheadsError, with the reason, for a clip to drop: without a face in too many frames or too many in a row,
    with a face too small to learn from, or with one that jumps, which is a cut or another person.
    """
    seen = _seen(landmarks)
    count, missing = len(seen), int((~seen).sum())
    if missing == count:
        raise DheadsError(f"no face in any of {count} frames")
    filled = fill_gaps(landmarks, config.max_gap)
    if not _seen(filled).all() or missing > config.max_missing * count:
        raise DheadsError(f"no face in {missing} of {count} frames")
    width = float(np.median(_widths(landmarks[seen])))
    if width < config.min_face_px:
        raise DheadsError(f"the face is {width:.0f} px wide, less than {config.min_face_px:g}")
    jump = _first_jump(landmarks, np.flatnonzero(seen), config.max_jump)
    if jump is not None:
        raise DheadsError(f"the face jumps at frame {jump}: another face, or a cut")
    return filled


def screen_sync(sync: Sync, config: PreparationConfig) -> None:
    """Raises DheadsError, with the reason, for a clip whose lips and sound do not correlate or are too far apart."""
    if sync.correlation < config.min_sync:
        raise DheadsError(f"lips and sound do not belong together: their correlation is {sync.correlation:.2f} at best")
    if abs(sync.offset_seconds) > config.max_offset_seconds:
        apart = abs(sync.offset_seconds)
        raise DheadsError(f"lips and sound are {apart:.2f} s apart (correlation {sync.correlation:.2f})")


def _seen(landmarks: np.ndarray) -> np.ndarray:
    seen: np.ndarray = np.isfinite(landmarks).all(axis=(1, 2))  # (F,)
    return seen


def _widths(landmarks: np.ndarray) -> np.ndarray:
    """(F, 68, 2) -> (F,): from jaw to jaw, px."""
    widths: np.ndarray = np.linalg.norm(landmarks[:, 16] - landmarks[:, 0], axis=-1)
    return widths


def _first_jump(landmarks: np.ndarray, seen: np.ndarray, max_jump: float) -> int | None:
    """The first frame whose face differs too much in position or size from that of the last frame with a face."""
    faces = landmarks[seen].astype(np.float64)
    centres = faces.mean(axis=1)  # (S, 2)
    # Not the width: a head that turns away becomes narrow quickly, but not small.
    sizes = np.linalg.norm(faces - centres[:, None], axis=-1).mean(axis=1)
    moved = np.linalg.norm(np.diff(centres, axis=0), axis=-1) / np.median(_widths(faces))
    grown = np.abs(np.diff(np.log(sizes)))
    # Over g frames a head moves about sqrt(g) times as far as over one.
    slack = np.sqrt(np.diff(seen))
    jumps = np.flatnonzero((moved > max_jump * slack) | (grown > np.log(_MAX_GROWTH) * slack))
    return int(seen[jumps[0] + 1]) if len(jumps) else None
