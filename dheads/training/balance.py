"""How often each clip is used where examples are balanced by speakers (extensions.examples.balance)."""

from __future__ import annotations

import numpy as np

from dheads.dataset.manifest import Clip


def clip_shares(clips: list[Clip], still_share: float, speaker_cap: float, source_cap: float = 1.0) -> np.ndarray:
    """The probability of each clip, float64, with sum 1.

    A speaker's probability is proportional to the square root of the number of their clips, up to `speaker_cap`; that
    of all clips from one folder of the raw data is at most `source_cap`. Photos (clips of one frame) have `still_share`
    in total.
    """
    still = np.array([not clip.moves for clip in clips])
    speakers, index = np.unique([clip.speaker for clip in clips], return_inverse=True)
    counts = np.bincount(index[~still], minlength=len(speakers))  # of clips that move
    by_speaker = np.sqrt(counts)
    if by_speaker.sum() > 0:
        by_speaker = _capped(by_speaker / by_speaker.sum(), speaker_cap)
    shares: np.ndarray = (by_speaker / np.maximum(1, counts))[index] * ~still
    if shares.any():
        _, source = np.unique([clip.source.partition("/")[0] for clip in clips], return_inverse=True)
        by_source = np.bincount(source, shares)
        shares *= (_capped(by_source, source_cap) / np.where(by_source > 0, by_source, 1))[source]
    moving_share = 1.0 if not still.any() else 0.0 if still.all() else 1 - still_share
    shares *= moving_share
    shares[still] = (1 - moving_share) / max(1, still.sum())
    shares /= shares.sum()
    return shares


def _capped(shares: np.ndarray, cap: float) -> np.ndarray:
    """Shares of sum 1, none above the cap; a cap lower than an even split counts as that split."""
    cap = max(cap, 1 / np.count_nonzero(shares))
    capped, over = shares, np.zeros(len(shares), dtype=bool)
    while True:
        # The excess is divided among the others, which may lift some of them over the cap.
        capped = np.where(over, cap, shares * (1 - cap * over.sum()) / shares[~over].sum())
        still_over = over | (capped > cap + 1e-12)
        if (still_over == over).all():
            break
        over = still_over
    return capped
