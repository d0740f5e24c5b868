"""Mel-frequency cepstral coefficients (MFCC) as python_speech_features 0.6 computes them, for SyncNet."""

from __future__ import annotations

import numpy as np

from dheads.config import SAMPLE_RATE

_WINDOW, _HOP, _FFT = 400, 160, 512  # samples: 25 ms, 10 ms
_FILTERS, _COEFFICIENTS, _LIFTER = 26, 13, 22
_PREEMPHASIS = 0.97
_EPS = np.finfo(float).eps  # replaces zero before a logarithm
_WINDOWS_PER_CHUNK = 3000  # 30 s


def mfcc(waveform: np.ndarray) -> np.ndarray:
    """MFCC (T, 13) float64, a row every 10 ms, of a 16 kHz waveform (N,) in int16 units.

    T = 1 + ceil((N - 400) / 160); the last window is padded with zeros. The first coefficient is the logarithm of the
    window's energy.
    """
    # y_n = x_n - 0.97 x_(n-1)
    signal = np.append(waveform[:1], waveform[1:] - _PREEMPHASIS * waveform[:-1].astype(np.float64))
    count = 1 + max(0, -(-(len(signal) - _WINDOW) // _HOP))
    signal = np.pad(signal, (0, max(0, (count - 1) * _HOP + _WINDOW - len(signal))))
    windows = np.lib.stride_tricks.sliding_window_view(signal, _WINDOW)[::_HOP][:count]  # (T, 400), a view
    return np.concatenate(
        [_cepstra(windows[begin : begin + _WINDOWS_PER_CHUNK]) for begin in range(0, count, _WINDOWS_PER_CHUNK)]
    )


def _cepstra(windows: np.ndarray) -> np.ndarray:
    """(T, 13) of windows (T, 400)."""
    # P_k = |FFT(x)_k|^2 / 512
    power = np.abs(np.fft.rfft(windows, _FFT)) ** 2 / _FFT  # (T, 257)
    mel = _log(power @ _mel_filters().T)  # (T, 26)
    # c_i = (1 + 11 sin(pi i / 22)) DCT(mel)_i
    i = np.arange(_COEFFICIENTS)
    cepstra: np.ndarray = (1 + _LIFTER / 2 * np.sin(np.pi * i / _LIFTER)) * (mel @ _dct().T)  # (T, 13)
    cepstra[:, 0] = _log(power.sum(axis=1))
    return cepstra


def _log(x: np.ndarray) -> np.ndarray:
    logarithm: np.ndarray = np.log(np.where(x == 0, _EPS, x))
    return logarithm


def _mel_filters() -> np.ndarray:
    """26 triangular filters (26, 257) over the bins of the spectrum, evenly spaced in mel from 0 to 8000 Hz."""
    # mel = 2595 log10(1 + hz / 700)
    edges_mel = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), _FILTERS + 2)
    edges_hz = 700 * (10 ** (edges_mel / 2595) - 1)
    edges = np.floor((_FFT + 1) * edges_hz / SAMPLE_RATE)  # bins
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]  # (26, 1)
    bins = np.arange(_FFT // 2 + 1)
    filters: np.ndarray = np.clip(np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)), 0, None)
    return filters


def _dct() -> np.ndarray:
    """The first rows (13, 26) of the orthonormal DCT-II."""
    # D_ij = sqrt(2 / M) cos(pi i (2 j + 1) / 2 M), the row i = 0 divided by sqrt 2
    i, j = np.arange(_COEFFICIENTS)[:, None], np.arange(_FILTERS)
    rows: np.ndarray = np.sqrt(2 / _FILTERS) * np.cos(np.pi * i * (2 * j + 1) / (2 * _FILTERS))
    rows[0] /= np.sqrt(2)
    return rows
