"""The pixels of a decoded frame as a player shows them: upright, in proportion, in the colours of plain (SDR) video.

HDR video (HLG and PQ of BT.2100) and wide gamuts (BT.2020, Display P3) are brought to BT.709 by a table of colours that
FFmpeg's filter lut3d interpolates.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter

# Without these, swscale takes the nearest chroma sample and rounds down.
SCALER = (
    Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND
)
_UNSAID, _RGB = 2, 0  # numbers of the matrix in a stream
_HD_LINES = 720  # from these on, video that does not say its matrix is BT.709
_MOST_ANAMORPHIC = 4  # a pixel that is longer is a damaged number

_GRID = 33  # colours of the table along each axis
_GAMMA = 2.4  # of a display of plain video (BT.1886)
# Linear light of BT.2020 and of Display P3 to that of BT.709.
_BT709 = np.eye(3)
_GAMUTS = {
    ColorPrimaries.BT2020: (
        (1.660491, -0.587641, -0.07285),
        (-0.12455, 1.1329, -0.00835),
        (-0.018151, -0.100579, 1.11873),
    ),
    ColorPrimaries.SMPTE432: (
        (1.22494, -0.22494, 0.0),
        (-0.042057, 1.042057, 0.0),
        (-0.019638, -0.078636, 1.098274),
    ),
}
_BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593])
_HLG_NITS = 1000  # of the display for which HLG is defined
# What is shown as white: 203 nits, where cameras put it (BT.2408), or 100 nits, where plain video that was made HDR has
# it. It counts as such while less than a thousandth of a frame is brighter than 120 nits.
_CAMERA_WHITE, _PLAIN_WHITE, _PLAIN_LIMIT = 203.0, 100.0, 120.0
_KNEE = 0.85  # of white: what is brighter is compressed, so that lights keep their shades


class ToRgb:
    """Turns the frames of a video, in their order, into (H, W, 3) uint8 RGB; what is transparent is white."""

    def __init__(self) -> None:
        self._scaler = VideoReformatter()  # one for all frames: each would take as long to set up as to use
        self._table: Graph | None = None
        self._table_of: tuple[object, ...] = ()
        self._white = _PLAIN_WHITE

    def __call__(self, frame: av.VideoFrame, pixel_aspect: Fraction | None = None) -> np.ndarray:
        """pixel_aspect: the width of a pixel over its height."""
        rotation = round(frame.rotation / 90)
        translucent = any(component.is_alpha for component in frame.format.components)
        if frame.color_primaries in _GAMUTS or frame.color_trc in _LIGHT:
            frame = self._plain(frame)
        image = self._scaled(frame, "rgba" if translucent else "rgb24", *_proportions(frame, pixel_aspect)).to_ndarray()
        if translucent:
            alpha = image[..., 3:] / np.float32(255)
            image = np.rint(image[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
        return np.ascontiguousarray(np.rot90(image, rotation))

    def _scaled(
        self, frame: av.VideoFrame, pixel_format: str, width: int | None = None, height: int | None = None
    ) -> av.VideoFrame:
        matrix = None
        if frame.colorspace == _UNSAID:
            matrix = Colorspace.ITU709 if frame.height >= _HD_LINES else Colorspace.ITU601
        return self._scaler.reformat(frame, width, height, pixel_format, src_colorspace=matrix, interpolation=SCALER)

    def _plain(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The frame in the colours of plain video, gbrp16le."""
        gamut, curve = frame.color_primaries, frame.color_trc
        frame = self._scaled(frame, "gbrp16le")
        frame.colorspace, frame.color_range = _RGB, ColorRange.JPEG
        if curve in _LIGHT and self._white == _PLAIN_WHITE and _is_brighter(frame, _LIGHT[curve], _PLAIN_LIMIT):
            self._white = _CAMERA_WHITE
        wanted = (frame.width, frame.height, gamut, curve, self._white)
        if self._table_of != wanted:
            self._table, self._table_of = _table(*wanted), wanted
        self._table.vpush(frame)
        return self._table.vpull()


def _proportions(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """Width and height for square pixels; none is lost."""
    if not pixel_aspect or not 1 / _MOST_ANAMORPHIC <= pixel_aspect <= _MOST_ANAMORPHIC:
        return frame.width, frame.height
    return round(frame.width * max(pixel_aspect, 1)), round(frame.height / min(pixel_aspect, 1))


# --- Light -----------------------------------------------------------------------------------------------------------


def _hlg(signal: np.ndarray) -> np.ndarray:
    """HLG's signal (..., 3) in [0, 1] -> the light of its display (..., 3) in nits."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return _HLG_NITS * scene * (scene @ _BT2020_LUMA)[..., None] ** 0.2


def _pq(signal: np.ndarray) -> np.ndarray:
    """PQ's signal (..., 3) in [0, 1] -> light (..., 3) in nits."""
    root = signal ** (32 / 2523)
    return 10_000 * (np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)) ** (8192 / 1305)


_LIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {ColorTrc.ARIB_STD_B67: _hlg, ColorTrc.SMPTE2084: _pq}


def _is_brighter(frame: av.VideoFrame, light: Callable[[np.ndarray], np.ndarray], nits: float) -> bool:
    """Whether a thousandth of a gbrp16le frame's pixels are, as the green of every eighth of each eighth row tells."""
    (green, *_) = frame.planes
    rows = np.frombuffer(green, np.uint16).reshape(green.height, -1)
    signal = np.quantile(rows[::8, : green.width : 8], 0.999) / 65535
    return bool(light(np.full(3, signal))[1] > nits)


def _rolled_off(light: np.ndarray) -> np.ndarray:
    """Light (..., 3), 1: white, compressed below 1 without a change of hue."""
    most = light.max(axis=-1, keepdims=True)
    over = np.maximum(most - _KNEE, 0) / (1 - _KNEE)
    shown = np.where(over > 0, _KNEE + (1 - _KNEE) * over / (1 + over), most)
    return light * shown / np.maximum(most, 1e-6)


# --- The table -------------------------------------------------------------------------------------------------------


def to_plain(signal: np.ndarray, gamut: int, curve: int, white: float = _CAMERA_WHITE) -> np.ndarray:
    """RGB (..., 3) in [0, 1] of any video -> the same colours in plain video's RGB.

    gamut, curve: H.273's numbers of primaries and transfer; white: nits of what is to be white, in HDR.
    """
    light = _LIGHT[curve](signal) / white if curve in _LIGHT else signal**_GAMMA
    light = np.maximum(light @ np.array(_GAMUTS.get(gamut, _BT709)).T, 0)
    return np.clip(_rolled_off(light) if curve in _LIGHT else light, 0, 1) ** (1 / _GAMMA)


def _table(width: int, height: int, gamut: int, curve: int, white: float) -> Graph:
    """A filter of gbrp16le frames that looks up their colours."""
    axis = np.linspace(0, 1, _GRID)
    blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")  # red changes fastest
    colours = to_plain(np.stack([red, green, blue], axis=-1), gamut, curve, white).reshape(-1, 3)
    graph = Graph()
    with TemporaryDirectory() as folder:
        cube = Path(folder) / "table.cube"
        np.savetxt(cube, colours, "%.6f", header=f"LUT_3D_SIZE {_GRID}", comments="")
        frames = f"video_size={width}x{height}:pix_fmt=gbrp16le:time_base=1/1:colorspace=gbr:range=pc"
        source, sink = graph.add("buffer", frames), graph.add("buffersink")
        graph.link_nodes(source, graph.add("lut3d", file=str(cube), interp="tetrahedral"), sink).configure()
    return graph
