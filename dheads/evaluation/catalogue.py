"""The definitions of the measures of `dheads eval`, and the values that the paper reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dheads.faces.head_pose import POSE

_PAPER_ITSELF = "Stypulkowski et al. 2024, the released script"


@dataclass(frozen=True)
class Measure:
    """A measure of a generated clip or of the whole set."""

    name: str  # key in all outputs; the value of the real clip alone has the prefix `true_`
    title: str
    definition: str
    source: str  # who defined it
    better: Literal["higher", "lower", "truth"]  # truth: closer to the value of the real clips
    unit: str  # empty for a dimensionless number


_POSE_UNITS = dict(zip(POSE, ["log", "rad", "half crops", "half crops", "eye distances", "eye distances"], strict=True))


def _head_measures(name: str, what: str, definition: str, unit: str) -> list[Measure]:
    """The summary of one property of the six pose numbers, and the property of each; `unit` is a suffix."""
    summary = Measure(
        name,
        f"Head: {what}",
        f"{definition}, divided by the real clips': the geometric mean of the six pose numbers; 1 is as much as real. "
        "Of the whole set it compares the means over clips",
        "dheads",
        "truth",
        "",
    )
    return [summary] + [
        Measure(
            f"{name}_{number}", f"Head: {what} of {number}", f"{definition}, of {number}", "dheads", "truth", at + unit
        )
        for number, at in _POSE_UNITS.items()
    ]


_MEASURES = [
    Measure(
        "fvd",
        "FVD",
        "Frechet distance between I3D's features of generated and real clips of 16 whole frames; of the whole set",
        "Unterthiner et al. 2018, computed as StyleGAN-V does",
        "lower",
        "",
    ),
    Measure(
        "fid",
        "FID",
        "Frechet distance between Inception-v3's features of generated and real whole frames; of the whole set",
        "Heusel et al. 2017, computed as pytorch-fid does",
        "lower",
        "",
    ),
    Measure(
        "blinks_per_second",
        "Blinks a second",
        "How often the eyes' aspect ratio falls below 0.75 of the clip's median for two frames or more",
        "Soukupova and Cech 2016",
        "truth",
        "1/s",
    ),
    Measure(
        "blink_seconds",
        "Length of a blink",
        "How long the eyes' aspect ratio stays below 0.75 of the clip's median, mean over the clip's blinks",
        "Soukupova and Cech 2016",
        "truth",
        "s",
    ),
    Measure(
        "ofm_paper",
        "OFM, as published",
        "Optical flow as the paper's script computes it: the magnitude in each frame is stretched to 0..255 and shown "
        "as JET colours, of which the levels are averaged; a still video scores 42.67",
        _PAPER_ITSELF,
        "truth",
        "",
    ),
    Measure(
        "fmse_paper",
        "F-MSE, as published",
        "Squared difference of consecutive frames as the paper's script computes it: in 8 bits, modulo 256",
        _PAPER_ITSELF,
        "truth",
        "",
    ),
    Measure(
        "av_offset",
        "AV offset",
        "Frames by which the picture is late: the shift of the sound at which SyncNet's embeddings are closest",
        "Chung and Zisserman 2016 (SyncNet)",
        "truth",
        "frames",
    ),
    Measure(
        "av_confidence",
        "AV confidence (LSE-C)",
        "The median minus the minimum of SyncNet's distances over all shifts of the sound",
        "Chung and Zisserman 2016 (SyncNet); Prajwal et al. 2020 (LSE-C)",
        "higher",
        "",
    ),
    Measure(
        "av_distance",
        "AV distance (LSE-D)",
        "The minimum of SyncNet's distances over all shifts of the sound",
        "Chung and Zisserman 2016 (SyncNet); Prajwal et al. 2020 (LSE-D)",
        "lower",
        "",
    ),
    Measure(
        "sync_offset_ms",
        "Sync: offset",
        "By how much the picture is late: the shift of best correlation of the mouth's opening that is seen with the "
        "one that the packaged lip code hears",
        "dheads",
        "truth",
        "ms",
    ),
    Measure(
        "sync_correlation",
        "Sync: correlation",
        "Pearson's r, at that shift, of the mouth's opening that is seen with the one that the packaged lip code hears",
        "dheads",
        "truth",
        "",
    ),
    Measure(
        "wer",
        "Word error rate",
        "Words that a lip reader gets wrong, misses or adds, divided by the words spoken; of the whole set. It depends "
        "on the lip reader: the paper's is private",
        "Levenshtein 1966",
        "lower",
        "",
    ),
    Measure(
        "ssim",
        "SSIM",
        "Structural similarity of each aligned frame to the real frame of the same time, at the generated one's scale",
        "Wang et al. 2004",
        "higher",
        "",
    ),
    Measure(
        "psnr",
        "PSNR",
        "Peak signal-to-noise ratio of each aligned frame against the real frame of the same time, at the generated "
        "one's scale; at most 100",
        "mean over frames of 10 log10(255^2 / MSE)",
        "higher",
        "dB",
    ),
    Measure(
        "lmd",
        "LMD",
        "Distance of the mouth's landmarks from the real ones of the same time, after centring both mouths",
        "Chen et al. 2018",
        "lower",
        "px at 128",
    ),
    Measure(
        "ofm",
        "Optical flow",
        "Mean length of the optical flow from frame to frame, with frames resized to 128 px",
        "Farneback 2003",
        "truth",
        "px a frame",
    ),
    Measure(
        "fmse",
        "Frame difference",
        "Mean squared difference of consecutive frames, levels from 0 to 255, with frames resized to 128 px",
        "the paper's F-MSE without its wrap-around",
        "truth",
        "",
    ),
    Measure(
        "mouth_correlation",
        "Mouth: correlation",
        "Pearson's r of the opening between the inner lips and that of the real clip over time",
        "dheads",
        "higher",
        "",
    ),
    Measure(
        "mouth_offset_frames",
        "Mouth: offset",
        "Frames, up to 5 either way, by which the mouth's opening is late: the shift of best correlation with that of "
        "the real clip, refined by a parabola",
        "dheads",
        "truth",
        "frames",
    ),
    Measure(
        "mouth_range_ratio",
        "Mouth: range",
        "The 95th minus the 5th percentile of the mouth's opening, divided by the real clip's; 1 is as wide as real",
        "dheads",
        "truth",
        "",
    ),
    Measure(
        "mouth_slope",
        "Mouth: slope",
        "Slope of the regression line of the opening between the inner lips over the opening that the weights' lip "
        "code foretells from the sound; 1 is as wide as heard. Of weights with a lip code",
        "dheads",
        "higher",
        "",
    ),
    Measure(
        "mouth_sharpness",
        "Mouth: sharpness",
        "Variance of the Laplacian of the mouth region, divided by the real clip's at the same scale; 1 is as sharp",
        "Pech-Pacheco et al. 2000",
        "truth",
        "",
    ),
    *_head_measures(
        "head_range",
        "range",
        "Standard deviation over time of the head's pose in the picture, landmarks smoothed over 1.5 frames",
        "",
    ),
    *_head_measures(
        "head_speed",
        "speed",
        "Root mean square of the change of the head's pose in the picture from frame to frame, landmarks smoothed over "
        "1.5 frames",
        " a frame",
    ),
    Measure(
        "identity_similarity",
        "Identity: similarity",
        "Cosine of each frame's face embedding (SFace) with that of the real clip's first frame, mean over the frames; "
        "from 0.363 on, two faces count as the same person's",
        "Zhong et al. 2021 (SFace)",
        "higher",
        "",
    ),
    Measure(
        "identity_shape",
        "Identity: shape",
        "Distance of the landmarks other than mouth and lower jaw from those of the real clip's first frame",
        "dheads",
        "lower",
        "eye distances",
    ),
    Measure(
        "landmark_drift",
        "Drift of the shape",
        "Distance between the mean face shapes of the last and the first second",
        "dheads",
        "truth",
        "eye distances",
    ),
    Measure(
        "colour_drift",
        "Drift of the colour",
        "Difference between the face's mean colours in the last and the first second, levels from 0 to 255",
        "dheads",
        "truth",
        "levels",
    ),
]
CATALOGUE = {measure.name: measure for measure in _MEASURES}

# ---- The paper's tables ----

Table = dict[str, dict[str, float]]  # system -> measure -> value

_CREMA = ("fvd", "fid", "blinks_per_second", "blink_seconds", "ofm_paper", "fmse_paper", "av_offset", "av_confidence")
_LRW = (*_CREMA, "wer")


def _table(measures: tuple[str, ...], rows: dict[str, tuple[float | None, ...]]) -> Table:
    return {
        system: {name: value for name, value in zip(measures, values, strict=True) if value is not None}
        for system, values in rows.items()
    }


# Table 1 of the paper. GT: the real clips.
PAPER: dict[str, Table] = {
    "crema": _table(
        _CREMA,
        {
            "SDA": (376.48, 79.82, 0.25, 0.26, 68.21, 6.83, 2, 5.50),
            "Wav2Lip": (193.32, 12.57, 0, None, 46.87, 1.07, -2, 6.68),
            "PC-AVS": (333.94, 22.53, 0.02, 0.20, 70.36, 6.93, -3, 6.17),
            "EAMM": (196.82, 19.40, 0, None, 58.91, 1.65, -2, 4.26),
            "Diffused Heads": (88.61, 12.45, 0.28, 0.36, 64.30, 6.99, 1, 4.52),
            "GT": (None, None, 0.24, 0.40, 68.76, 7.76, 1, 5.14),
        },
    ),
    "lrw": _table(
        _LRW,
        {
            "SDA": (198.84, 61.95, 0.52, 0.28, 73.82, 18.94, 1, 7.40, 0.77),
            "MakeItTalk": (269.29, 7.57, 0.09, 0.28, 57.21, 3.44, -3, 3.16, 0.99),
            "Wav2Lip": (366.14, 2.83, 0.03, 0.16, 47.12, 1.45, -2, 6.58, 0.51),
            "PC-AVS": (153.12, 11.96, 0.20, 0.16, 69.59, 17.13, -3, 6.24, 0.64),
            "EAMM": (172.18, 9.28, 0.03, 0.16, 58.46, 4.39, -3, 3.83, 0.95),
            "Diffused Heads": (71.88, 3.94, 0.35, 0.28, 70.71, 19.69, -2, 4.61, 0.77),
            "GT": (None, None, 0.53, 0.28, 72.02, 27.34, -2, 5.83, None),
        },
    ),
}
