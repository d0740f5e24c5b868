"""The table of speech encoders: from a name in a configuration to a frozen network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from dheads.errors import DheadsError
from dheads.speech.bundles import BUNDLES, load_bundle
from dheads.speech.interface import SpeechEncoder
from dheads.speech.released import load_released
from dheads.speech.whisper import load_whisper

Loader: TypeAlias = Callable[[torch.device, bool], SpeechEncoder]  # from the device, and whether to show progress


def _bundle_loader(name: str) -> Loader:
    return lambda device, progress: load_bundle(name, progress)


_LOADERS: dict[str, Loader] = {
    "whisper-tiny.en": lambda device, progress: load_whisper(),
    "diffused-heads": load_released,
    **{name: _bundle_loader(name) for name in BUNDLES},
}


def load_speech_encoder(name: str, device: str | torch.device = "cpu", progress: bool = True) -> SpeechEncoder:
    """The frozen encoder of that name, downloaded where it is not packaged.

    progress: whether a download shows a bar. Raises DheadsError for an unknown name, listing the known ones, and
    where the encoder cannot be downloaded or read, or its licence is not accepted.
    """
    if name not in _LOADERS:
        raise DheadsError(f"unknown speech encoder {name!r}; the known ones are {', '.join(sorted(_LOADERS))}")
    return _LOADERS[name](torch.device(device), progress).eval().requires_grad_(False).to(device)
