"""Decoded frames to RGB as a player shows them: upright, with square pixels, in the colours of SDR video.

HDR video (HLG and PQ of BT.2100) and wide gamuts (BT.2020, Display P3) are converted to BT.709 by a colour table that
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

# Planar: swscale makes the same pixels as packed "rgb24" in half the time.
RGB = "gbrp"
# Without these, swscale takes the nearest chroma sample and rounds down.
SCALER = (
    Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND
)
_UNSPECIFIED, _RGB = 2, 0  # matrix coefficients in H.273
_HD_LINES = 720  # video of at least this height without a stated matrix is BT.709
_MAX_PIXEL_ASPECT = 4  # a pixel that is longer is a damaged number

_GRID = 33  # colours of the table along each axis
_GAMMA = 2.4  # of an SDR display (BT.1886)
# Linear light of BT.2020 and of Display P3 to that of BT.709.
_BT709 = np.eye(3)
_GAMUTS: dict[int, np.ndarray] = {
    ColorPrimaries.BT2020: np.array(
        [
            (1.660491, -0.587641, -0.07285),
            (-0.12455, 1.1329, -0.00835),
            (-0.018151, -0.100579, 1.11873),
        ]
    ),
    ColorPrimaries.SMPTE432: np.array(
        [
            (1.22494, -0.22494, 0.0),
            (-0.042057, 1.042057, 0.0),
            (-0.019638, -0.078636, 1.098274),
        ]
    ),
}
_BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593])
_HLG_NITS = 1000  # peak of the display for which HLG is defined
# The level of white: 203 nits in HDR from cameras (BT.2408), 100 nits in SDR that was converted to HDR. A video counts
# as converted SDR while less than a thousandth of each frame is brighter than 120 nits.
_CAMERA_WHITE, _SDR_WHITE, _SDR_LIMIT = 203.0, 100.0, 120.0
_KNEE = 0.85  # of white: brighter light is compressed, so that highlights keep their shades


class ToRgb:
    """Converts the frames of a video, in their order, to (H, W, 3) uint8 RGB; transparent pixels become white."""

    def __init__(self) -> None:
        self._scaler = VideoReformatter()  # one for all frames: each would take as long to set up as to use
        self._table: Graph | None = None
        self._table_key: tuple[int, int, int, int, float] | None = None  # the arguments of `_table`
        self._white = _SDR_WHITE

    def __call__(self, frame: av.VideoFrame, pixel_aspect: Fraction | None = None) -> np.ndarray:
        """A frame as (H, W, 3) uint8 RGB. pixel_aspect: the width of a pixel over its height, None for 1."""
        rotation = round(frame.rotation / 90)
        translucent = any(component.is_alpha for component in frame.format.components)
        if frame.color_primaries in _GAMUTS or frame.color_trc in _LIGHT:
            frame = self._sdr(frame)
        pixel_format, (width, height) = "rgba" if translucent else RGB, _square_pixel_size(frame, pixel_aspect)
        image: np.ndarray = self._scaled(frame, pixel_format, width, height).to_ndarray()
        if translucent:
            alpha = image[..., 3:] / np.float32(255)
            image = np.rint(image[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
        return np.ascontiguousarray(np.rot90(image, rotation))

    def _scaled(
        self, frame: av.VideoFrame, pixel_format: str, width: int | None = None, height: int | None = None
    ) -> av.VideoFrame:
        matrix = None
        if frame.colorspace == _UNSPECIFIED:
            matrix = Colorspace.ITU709 if frame.height >= _HD_LINES else Colorspace.ITU601
        return self._scaler.reformat(frame, width, height, pixel_format, src_colorspace=matrix, interpolation=SCALER)

    def _sdr(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The frame in the colours of SDR video, gbrp16le."""
        gamut, curve = frame.color_primaries, frame.color_trc
        frame = self._scaled(frame, "gbrp16le")
        frame.colorspace, frame.color_range = _RGB, ColorRange.JPEG
        if curve in _LIGHT and self._white == _SDR_WHITE and _is_brighter(frame, _LIGHT[curve], _SDR_LIMIT):
            self._white = _CAMERA_WHITE
        key = (frame.width, frame.height, gamut, curve, self._white)
        if self._table is None or self._table_key != key:
            self._table, self._table_key = _table(*key), key
        self._table.vpush(frame)
        return self._table.vpull()


def _square_pixel_size(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """Width and height with square pixels; neither is less than the frame's own."""
    if not pixel_aspect or not 1 / _MAX_PIXEL_ASPECT <= pixel_aspect <= _MAX_PIXEL_ASPECT:
        return frame.width, frame.height
    return round(frame.width * max(pixel_aspect, Fraction(1))), round(frame.height / min(pixel_aspect, Fraction(1)))


# --- Light -----------------------------------------------------------------------------------------------------------


def _hlg(signal: np.ndarray) -> np.ndarray:
    """An HLG signal (..., 3) in [0, 1] -> display light (..., 3) in nits (BT.2100: inverse OETF, then OOTF)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    display: np.ndarray = _HLG_NITS * scene * (scene @ _BT2020_LUMA)[..., None] ** 0.2
    return display


def _pq(signal: np.ndarray) -> np.ndarray:
    """A PQ signal (..., 3) in [0, 1] -> display light (..., 3) in nits (BT.2100's EOTF)."""
    root = signal ** (32 / 2523)
    light: np.ndarray = 10_000 * (np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)) ** (8192 / 1305)
    return light


# The EOTF of each HDR transfer, by its number in H.273.
_LIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {ColorTrc.ARIB_STD_B67: _hlg, ColorTrc.SMPTE2084: _pq}


def _is_brighter(frame: av.VideoFrame, light: Callable[[np.ndarray], np.ndarray], nits: float) -> bool:
    """Whether a thousandth of a gbrp16le frame's pixels are brighter, by the green of every eighth row and column."""
    (green, *_) = frame.planes
    rows = np.frombuffer(memoryview(green), np.uint16).reshape(green.height, -1)
    signal = np.quantile(rows[::8, : green.width : 8], 0.999) / 65535
    return bool(light(np.full(3, signal))[1] > nits)


def _rolled_off(light: np.ndarray) -> np.ndarray:
    """Light (..., 3), where 1 is white, compressed below 1 without a change of hue."""
    peak = light.max(axis=-1, keepdims=True)
    over = np.maximum(peak - _KNEE, 0) / (1 - _KNEE)
    shown = np.where(over > 0, _KNEE + (1 - _KNEE) * over / (1 + over), peak)
    compressed: np.ndarray = light * shown / np.maximum(peak, 1e-6)
    return compressed


# --- The table -------------------------------------------------------------------------------------------------------


def to_sdr(signal: np.ndarray, gamut: int, curve: int, white: float = _CAMERA_WHITE) -> np.ndarray:
    """An RGB signal (..., 3) in [0, 1] of any video -> the same colours as an SDR signal.

    gamut, curve: primaries and transfer by their numbers in H.273. white: the level of white in nits, for HDR.
    """
    light = _LIGHT[curve](signal) / white if curve in _LIGHT else signal**_GAMMA
    light = np.maximum(light @ _GAMUTS.get(gamut, _BT709).T, 0)
    sdr: np.ndarray = np.clip(_rolled_off(light) if curve in _LIGHT else light, 0, 1) ** (1 / _GAMMA)
    return sdr


def _table(width: int, height: int, gamut: int, curve: int, white: float) -> Graph:
    """A filter that converts gbrp16le frames to SDR by a colour table."""
    axis = np.linspace(0, 1, _GRID)
    blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")  # red changes fastest
    colours = to_sdr(np.stack([red, green, blue], axis=-1), gamut, curve, white).reshape(-1, 3)
    graph = Graph()
    with TemporaryDirectory() as folder:
        cube = Path(folder) / "table.cube"
        np.savetxt(cube, colours, "%.6f", header=f"LUT_3D_SIZE {_GRID}", comments="")
        frames = f"video_size={width}x{height}:pix_fmt=gbrp16le:time_base=1/1:colorspace=gbr:range=pc"
        source, sink = graph.add("buffer", frames), graph.add("buffersink")
        graph.link_nodes(source, graph.add("lut3d", file=str(cube), interp="tetrahedral"), sink).configure()
    return graph
