"""How a video moves: optical flow (OFM) and the difference of frames in a row (F-MSE), as published and as meant.

The script behind the paper's figures measures something else than it says: it squares differences in uint8, which wrap
modulo 256, and averages the colours of a JET map of the flow's magnitude, which it stretches to 0..255 in every frame.
So a still video scores OFM 42.67, and a jump of 16 counts 0. `ofm_paper` and `fmse_paper` follow it to the letter, to
stand beside published figures; `ofm` and `fmse` are the mean flow and the mean squared difference.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np

SIDE = 128  # px, at which frames are compared whatever their own size


def smoothness(frames: Iterable[np.ndarray]) -> dict[str, float]:
    """OFM and F-MSE of (H, W, 3) uint8 RGB frames, of which two are held at a time; empty for fewer than two frames.

    Means over all pairs of frames in a row: `ofm` in px a frame at 128 px, `fmse` in squared levels of 0 to 255;
    `ofm_paper` and `fmse_paper` as the released script has them.
    """
    meter = Smoothness()
    for frame in frames:
        meter.add(frame)
    return meter.values()


class Smoothness:
    """As `smoothness`, for frames that come one by one."""

    def __init__(self) -> None:
        self._last: np.ndarray | None = None
        self._sums = np.zeros(4)
        self._pairs = 0

    def add(self, frame: np.ndarray) -> None:
        """Take the next (H, W, 3) uint8 RGB frame."""
        # The script reads BGR and shrinks by cv2.resize's default, the nearest four pixels.
        frame = cv2.resize(frame[..., ::-1], (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
        if self._last is not None:
            self._sums += _pair(self._last, frame)
            self._pairs += 1
        self._last = frame

    def values(self) -> dict[str, float]:
        """The means so far, by name; empty before the second frame."""
        if not self._pairs:
            return {}
        names = ("ofm_paper", "fmse_paper", "ofm", "fmse")
        return dict(zip(names, (self._sums / self._pairs).tolist(), strict=True))


def _pair(last: np.ndarray, frame: np.ndarray) -> tuple[float, float, float, float]:
    """ofm_paper, fmse_paper, ofm and fmse of two (128, 128, 3) uint8 BGR frames."""
    magnitude = cv2.magnitude(*cv2.split(_flow(last, frame)))  # (128, 128) px
    difference = frame.astype(np.int32) - last
    wrapped = (difference * difference).astype(np.uint8)  # modulo 256
    return float(_jet(magnitude).mean()), float(wrapped.mean()), float(magnitude.mean()), float((difference**2).mean())


def _flow(last: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Farneback's optical flow (H, W, 2) px."""
    gray = [cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY) for picture in (last, frame)]
    return cv2.calcOpticalFlowFarneback(*gray, None, 0.5, 7, 5, 15, 5, 1.2, 0)


def _jet(magnitude: np.ndarray) -> np.ndarray:
    """The JET map (H, W, 3) uint8 of a magnitude (H, W) that is stretched to 0..255."""
    stretched = cv2.normalize(magnitude, None, 0, 255, cv2.NORM_MINMAX)
    return cv2.applyColorMap(stretched.astype(np.uint8), cv2.COLORMAP_JET)
