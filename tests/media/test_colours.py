"""Frames as a player shows them: HDR, wide gamuts, pixels that are not square, transparency."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image

from dheads.media.colours import SCALER, to_sdr
from dheads.media.reading import frame_at, read_frames

BT709, BT2020, DISPLAY_P3, PQ, HLG = 1, 9, 12, 16, 18  # numbers of primaries, matrix and transfer in H.273
# Linear BT.709 to linear BT.2020 (BT.2087) and to Display P3.
GAMUTS = {
    BT709: np.eye(3),
    BT2020: np.array([[0.627404, 0.329283, 0.043313], [0.069097, 0.91954, 0.011362], [0.016391, 0.088013, 0.895595]]),
    DISPLAY_P3: np.array([[0.822462, 0.177538, 0], [0.033194, 0.966806, 0], [0.017083, 0.072397, 0.91052]]),
}


def hlg(nits: np.ndarray) -> np.ndarray:
    """HLG's signal for the light (..., 3) of its 1000-nit display: the inverse of BT.2100's OOTF, then its OETF."""
    shown = nits / 1000
    luma = (shown @ (0.2627, 0.6780, 0.0593))[..., None]
    scene = shown * np.maximum(luma, 1e-9) ** (1 / 1.2 - 1)
    bright = 0.17883277 * np.log(np.maximum(12 * scene, 1) - 0.28466892) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), bright)


def pq(nits: np.ndarray) -> np.ndarray:
    """PQ's signal for light (..., 3): BT.2100's inverse EOTF."""
    y = (nits / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def signal(picture: np.ndarray, gamut: int, curve: int, white: float = 100) -> np.ndarray:
    """An SDR picture (..., 3) uint8 with white at that many nits as the signal (..., 3) in [0, 1] of other video."""
    light = np.clip((picture / 255) ** 2.4 @ GAMUTS[gamut].T, 0, 1)
    return {HLG: lambda: hlg(light * white), PQ: lambda: pq(light * white)}.get(curve, lambda: light ** (1 / 2.4))()


def write(path: Path, signals: list[np.ndarray], gamut: int, curve: int, **options: object) -> None:
    """A 10-bit video of RGB signals (H, W, 3) in [0, 1], next to lossless."""
    matrix = BT2020 if gamut == BT2020 else BT709
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.height, stream.width = signals[0].shape[:2]
        stream.pix_fmt = "yuv420p10le"
        coder = stream.codec_context
        coder.color_primaries, coder.color_trc, coder.colorspace, coder.color_range = gamut, curve, matrix, 1
        for name, value in options.items():
            setattr(coder, name, value)
        scaler = VideoReformatter()
        for rgb in signals:
            frame = av.VideoFrame.from_ndarray(np.rint(rgb * 65535).astype(np.uint16), format="rgb48le")
            colours = {"dst_colorspace": matrix, "src_color_range": 2, "dst_color_range": 1, "interpolation": SCALER}
            container.mux(stream.encode(scaler.reformat(frame, format="yuv420p10le", **colours)))
        container.mux(stream.encode())


@pytest.fixture
def face(examples: Path) -> np.ndarray:
    return np.asarray(Image.open(examples / "face.jpg"))[:256, :256]


def off(shown: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(shown.astype(int) - truth).mean())


# --- Colours


@pytest.mark.parametrize("white", [100, 203])
@pytest.mark.parametrize("curve", [HLG, PQ])
def test_hdr_is_as_bright_as_the_sdr_it_was_made_from(tmp_path: Path, face: np.ndarray, curve: int, white: int) -> None:
    """White can lie at 100 nits, as in converted SDR, or at 203 nits, as in HDR from cameras."""
    shown = signal(face, BT2020, curve, white)
    assert off(np.rint(255 * shown), face) > 10
    write(tmp_path / "a.mkv", [shown] * 2, BT2020, curve)
    for frame in read_frames(tmp_path / "a.mkv"):
        assert off(frame, face) < 5
        assert np.abs((frame.astype(int) - face).mean(axis=(0, 1))).max() < 3


def test_lights_brighter_than_white_keep_their_shades(tmp_path: Path) -> None:
    nits = np.repeat(np.repeat([5.0, 150, 203, 400], 32)[None, :, None], 64, axis=0) * np.ones(3)
    write(tmp_path / "a.mkv", [hlg(nits)], BT2020, HLG)
    shown = frame_at(tmp_path / "a.mkv")[32, 16::32].astype(int)
    assert np.ptp(shown, axis=-1).max() <= 2  # gray stays gray
    assert (np.diff(shown[:, 0]) >= 5).all()
    assert shown[1, 0] == pytest.approx(255 * (150 / 203) ** (1 / 2.4), abs=2)
    assert 240 <= shown[2, 0] <= 250


def test_a_clip_that_begins_dark_is_seen_as_a_cameras_once_it_is_bright(tmp_path: Path, face: np.ndarray) -> None:
    dark, bright = (signal(picture, BT2020, HLG, 203) for picture in (face // 8, face))
    write(tmp_path / "a.mkv", [dark, bright, dark], BT2020, HLG)
    shown = list(read_frames(tmp_path / "a.mkv"))
    assert off(shown[1], face) < 5
    assert off(shown[2], face // 8) < 3


@pytest.mark.parametrize("gamut", [BT2020, DISPLAY_P3])
def test_wide_gamuts(tmp_path: Path, face: np.ndarray, gamut: int) -> None:
    shown = signal(face, gamut, BT709)
    assert off(np.rint(255 * shown), face) > 2
    write(tmp_path / "a.mkv", [shown], gamut, BT709)
    assert off(frame_at(tmp_path / "a.mkv"), face) < 1.5


def test_the_formulas_undo_those_of_the_standards() -> None:
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 256, (500, 3))
    for gamut, curve, white in ((BT2020, HLG, 203), (BT2020, PQ, 203), (DISPLAY_P3, BT709, 100)):
        back = 255 * to_sdr(signal(plain, gamut, curve, white), gamut, curve, white)
        darker = plain.max(axis=-1) < 230  # lights are compressed
        assert np.abs(back - plain)[darker].max() < 1


@pytest.mark.parametrize(("lines", "matrix"), [(480, "ITU601"), (720, "ITU709")])
def test_the_matrix_of_video_that_states_none_goes_by_its_size(tmp_path: Path, lines: int, matrix: str) -> None:
    colour = np.array([200, 60, 40], np.uint8)
    picture = av.VideoFrame.from_ndarray(np.broadcast_to(colour, (lines, 64, 3)).copy(), format="rgb24")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, lines, "yuv420p"
        container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range="MPEG")))
        container.mux(stream.encode())
    assert np.abs(frame_at(tmp_path / "a.mkv").astype(int) - colour).max() <= 3


# --- Proportions


@pytest.mark.parametrize(
    ("aspect", "shape"),
    [
        (Fraction(64, 45), (90, 171)),
        (Fraction(2), (90, 240)),
        (Fraction(8, 9), (101, 120)),
        (Fraction(1, 2), (180, 120)),
        (Fraction(1), (90, 120)),
        (Fraction(100), (90, 120)),  # damaged
    ],
)
def test_pixels_that_are_not_square(tmp_path: Path, aspect: Fraction, shape: tuple[int, int]) -> None:
    y, x = np.mgrid[:90, :120]
    stored = np.repeat(((x + y) / 210)[..., None], 3, axis=-1)
    write(tmp_path / "a.mkv", [stored], BT709, BT709, sample_aspect_ratio=aspect)
    frame = frame_at(tmp_path / "a.mkv")
    assert frame.shape == (*shape, 3)
    y, x = np.mgrid[: shape[0], : shape[1]]
    ramp = ((x + 0.5) * 120 / shape[1] + (y + 0.5) * 90 / shape[0] - 1) / 210 * 255
    assert np.abs(frame[4:-4, 4:-4, 1] - ramp[4:-4, 4:-4]).max() < 4


# --- Transparency


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    picture = np.zeros((48, 64, 4), np.uint8)
    picture[..., 0], picture[:, 32:, 3], picture[:, :16, 3] = 200, 255, 128
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgba"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
        container.mux(stream.encode())
    assert frame_at(tmp_path / "a.mov")[24, [8, 24, 40]].tolist() == [[227, 127, 127], [255] * 3, [200, 0, 0]]
