"""The catalogue of measures and the paper's tables."""

from __future__ import annotations

from pathlib import Path

from dheads.evaluation.catalogue import CATALOGUE, PAPER

NAMES = """
fid fvd av_offset av_confidence av_distance blinks_per_second blink_seconds ofm_paper fmse_paper ofm fmse ssim psnr
mouth_sharpness lmd mouth_correlation mouth_offset_frames mouth_range_ratio identity_similarity identity_shape
landmark_drift colour_drift wer mouth_slope sync_offset_ms sync_correlation
head_range head_range_scale head_range_roll head_range_x head_range_y head_range_yaw head_range_pitch
head_speed head_speed_scale head_speed_roll head_speed_x head_speed_y head_speed_yaw head_speed_pitch
"""


def test_every_measure_is_defined() -> None:
    assert set(CATALOGUE) == set(NAMES.split())
    for name, measure in CATALOGUE.items():
        assert measure.name == name
        assert min(len(measure.title), len(measure.definition), len(measure.source)) > 2
        assert measure.better in {"higher", "lower", "truth"}
    assert len({measure.title for measure in CATALOGUE.values()}) == len(CATALOGUE)


def test_the_papers_rows(shared: Path) -> None:
    """As in paper.md."""
    text = (shared / "paper.md").read_text(encoding="utf-8")
    columns = ["fvd", "fid", "blinks_per_second", "blink_seconds", "ofm_paper", "fmse_paper", "av_offset"]
    columns += ["av_confidence", "wer"]
    for table, head in (("lrw", "| LRW |"), ("crema", "| CREMA |")):
        lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
        rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
        published = {
            system: {name: float(cell) for name, cell in zip(columns, cells, strict=False) if cell}
            for system, *cells in rows
        }
        assert PAPER[table] == published
        assert list(PAPER[table])[-1] == "GT"
        assert set().union(*PAPER[table].values()) <= set(CATALOGUE)
