"""The motion of a video: optical flow (OFM) and the difference of consecutive frames (F-MSE).

The script behind the paper's figures does not compute what the paper describes. It squares differences in uint8, which
wrap modulo 256, and averages the colours of a JET map of the flow magnitude, stretched to 0..255 in every frame. So a
still video scores OFM 42.67, and a jump of 16 levels counts 0. `ofm_paper` and `fmse_paper` reproduce the script, for
comparison with published figures; `ofm` and `fmse` are the mean flow and the mean squared difference.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np

SIDE = 128  # px to which all frames are resized


def smoothness(frames: Iterable[np.ndarray]) -> dict[str, float]:
    """OFM and F-MSE of (H, W, 3) uint8 RGB frames, of which two are held at a time; empty for fewer than two frames.

    Means over all pairs of consecutive frames: `ofm` in px per frame at 128 px, `fmse` in squared levels of 0 to 255,
    `ofm_paper` and `fmse_paper` as in the released script.
    """
    meter = Smoothness()
    for frame in frames:
        meter.add(frame)
    return meter.values()


class Smoothness:
    """As `smoothness`, for frames that arrive one by one."""

    def __init__(self) -> None:
        self._last: np.ndarray | None = None
        self._sums = np.zeros(4)
        self._pairs = 0

    def add(self, frame: np.ndarray) -> None:
        """Add the next (H, W, 3) uint8 RGB frame."""
        # As in the script: BGR, and cv2.resize's default, which interpolates the nearest four pixels.
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
    before, after = (cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY) for picture in (last, frame))
    # OpenCV's types do not know that it allocates a result given as None.
    flow: np.ndarray = cv2.calcOpticalFlowFarneback(  # type: ignore[call-overload]
        before, after, None, 0.5, 7, 5, 15, 5, 1.2, 0
    )
    return flow


def _jet(magnitude: np.ndarray) -> np.ndarray:
    """The JET map (H, W, 3) uint8 of a magnitude (H, W), stretched to 0..255."""
    stretched: np.ndarray = cv2.normalize(magnitude, None, 0, 255, cv2.NORM_MINMAX)  # type: ignore[call-overload]
    return cv2.applyColorMap(stretched.astype(np.uint8), cv2.COLORMAP_JET)
