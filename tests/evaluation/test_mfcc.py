"""MFCC: reference values of python_speech_features, the definition, and long sound."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dheads.evaluation.mfcc import mfcc

FRAMES = 24


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    u = np.arange(FRAMES * 640) / 16_000
    chirp = np.sin(2 * np.pi * (200 + 900 * u) * u)
    return np.round(8000 * chirp * (0.6 + 0.4 * np.sin(8 * np.pi * u))).astype(np.int16)


def test_mfcc_equal_the_reference(shared: Path, sound: np.ndarray) -> None:
    golden = json.loads((shared / "golden" / "syncnet.json").read_text())
    found = mfcc(sound)
    assert list(found.shape) == golden["mfcc_shape"]
    np.testing.assert_allclose(found[0], golden["mfcc_row0"], atol=1e-9)
    np.testing.assert_allclose(found[40], golden["mfcc_row40"], atol=1e-9)


def cepstra_by_definition(window: np.ndarray) -> np.ndarray:
    """One row of 400 samples after preemphasis, with all sums written out."""
    n, k = np.arange(400), np.arange(257)[:, None]
    power = np.abs((window * np.exp(-2j * np.pi * k * n / 512)).sum(axis=1)) ** 2 / 512
    mels = [2595 * math.log10(1 + 8000 / 700) * m / 27 for m in range(28)]
    bins = [int(513 * 700 * (10 ** (mel / 2595) - 1) / 16_000) for mel in mels]
    logs = []
    for low, peak, high in zip(bins, bins[1:], bins[2:], strict=False):
        rising = sum(power[b] * (b - low) / (peak - low) for b in range(low, peak))
        falling = sum(power[b] * (high - b) / (high - peak) for b in range(peak, high))
        logs.append(math.log(rising + falling))
    row = []
    for i in range(13):
        cosines = sum(log * math.cos(math.pi * i * (2 * j + 1) / 52) for j, log in enumerate(logs))
        row.append((1 + 11 * math.sin(math.pi * i / 22)) * math.sqrt(2 / 26) * cosines)
    return np.array([math.log(power.sum()), *row[1:]])


def test_mfcc_follow_their_definition() -> None:
    sound = np.random.default_rng(0).normal(0, 1000, 800)
    emphasised = np.concatenate([sound[:1], sound[1:] - 0.97 * sound[:-1]])
    found = mfcc(sound)
    assert found.shape == (4, 13)
    np.testing.assert_allclose(found[1], cepstra_by_definition(emphasised[160:560]), rtol=1e-9)
    last = np.concatenate([emphasised[480:], np.zeros(80)])
    np.testing.assert_allclose(found[3], cepstra_by_definition(last), rtol=1e-9)


@pytest.mark.parametrize(("samples", "rows"), [(1, 1), (400, 1), (401, 2), (560, 2), (561, 3), (640 * 25, 99)])
def test_mfcc_have_a_row_every_ten_milliseconds(samples: int, rows: int) -> None:
    assert mfcc(np.ones(samples, np.int16)).shape == (rows, 13)


def test_mfcc_of_long_sound_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch, sound: np.ndarray) -> None:
    whole = mfcc(sound)
    monkeypatch.setattr("dheads.evaluation.mfcc._WINDOWS_PER_CHUNK", 40)
    np.testing.assert_allclose(mfcc(sound), whole, atol=1e-9)


def test_mfcc_of_silence_are_finite() -> None:
    assert np.isfinite(mfcc(np.zeros(1000, np.int16))).all()
