"""TorchScript files. They hold code: only files with the sha256 listed in weights.toml are opened."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from dheads.errors import DheadsError


def load_script(path: Path, device: torch.device | str = "cpu") -> torch.jit.ScriptModule:
    """The TorchScript module of a file whose hash was checked, in eval mode.

    Raises DheadsError where this version of torch cannot open it.
    """
    with warnings.catch_warnings():
        # torch.jit is deprecated, but it is the form in which these networks were released.
        warnings.filterwarnings("ignore", r"`torch\.jit\.load`", FutureWarning)
        try:
            script: torch.jit.ScriptModule = torch.jit.load(path, map_location=device)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise DheadsError(f"this version of torch cannot open the TorchScript file {path}: {reason}") from error
    script.eval()
    return script
