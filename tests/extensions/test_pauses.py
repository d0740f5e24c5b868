"""Where nothing is said, and that the mouth rests there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from real_data import write_wav

from dheads.evaluation.footage import track_face
from dheads.extensions.pauses import hushed, pause_degree
from dheads.faces.alignment import mouth_opening
from dheads.faces.landmarks import load_backend
from dheads.media.sound import load_waveform
from dheads.sampling.talker import Talker


@pytest.mark.parametrize(("change", "degree"), [(0.0, 1), (0.12, 1), (0.17, 0.5), (0.22, 0), (3.0, 0)])
def test_it_is_a_pause_where_the_codes_hardly_change(change: float, degree: float) -> None:
    codes = torch.zeros(13, 3)
    codes[1::2] = change  # there and back
    assert pause_degree(codes) == pytest.approx(degree, abs=1e-5)


def test_one_frame_is_not_a_pause() -> None:
    assert pause_degree(torch.ones(1, 3)) == 0


def test_the_sound_gives_way_to_its_mean() -> None:
    speech = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    assert torch.equal(hushed(speech, 0.0), speech)
    assert torch.equal(hushed(speech, 0.5), torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]))
    assert torch.equal(hushed(speech, 1.0), torch.tensor([[2.0, 1.0]] * 3))


def test_the_mouth_rests_where_nothing_is_said(packaged: Talker, examples: Path, tmp_path: Path) -> None:
    """As the packaged weights hear 0.8 s of the example and 0.8 s of digital silence."""
    speech = load_waveform(examples / "speech.wav")[8_000:20_800]
    write_wav(tmp_path / "pause.wav", torch.cat([speech, torch.zeros(12_800)]))
    # Landmarks of a head that moves tremble more.
    video = list(packaged.frames(examples / "face.jpg", tmp_path / "pause.wav", still=True, size=128))
    assert len(video) == 40
    opening = mouth_opening(track_face("the video", lambda: iter(video), load_backend("mesh")).landmarks)
    moves = np.abs(np.diff(opening))
    # The mouth has 0.4 s to close.
    assert moves[30:].mean() < 0.25 * moves[:20].mean()
