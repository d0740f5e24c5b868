"""Checkpoints: one safetensors file with the tensors of a network and, in its metadata, its complete configuration.

Loading one needs a path only and executes no code.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dheads import config as configuration
from dheads.config import Config
from dheads.errors import DheadsError
from dheads.extensions.network import ExtendedUNet
from dheads.system.files import complete_or_absent
from dheads.weights import listing
from dheads.weights.fetching import resolve
from dheads.weights.released import read_network

FORMAT = "dheads-1"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a checkpoint file."""

    config: Config
    tensors: dict[str, Tensor]  # float32, on the CPU
    info: dict[str, Any]  # training summary, data sources, licence
    path: Path  # for messages


def save_checkpoint(
    path: Path | str,
    tensors: dict[str, Tensor],
    config: Config,
    info: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a checkpoint, with its floating-point tensors in `dtype`; the file appears only when it is complete.

    Raises DheadsError where it cannot be written, and for numbers that are not finite, or too large for `dtype`.
    """
    path = Path(path)
    stored = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous().clone()
        for name, tensor in tensors.items()
    }
    if bad := _first_not_finite(stored):
        raise DheadsError(f"cannot write the checkpoint {path}: {bad} holds numbers that are not finite as {dtype}")
    texts = {"format": FORMAT, "config": json.dumps(configuration.to_dict(config)), "info": json.dumps(info)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_or_absent(path) as part:
            save_file(stored, part, metadata={**texts, "sha256": _digest(texts, stored)})
    except (OSError, SafetensorError) as error:
        raise DheadsError(f"cannot write the checkpoint {path}: {error}") from error


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read and check a checkpoint. Raises DheadsError for a file that is absent, damaged or of another kind."""
    path = Path(path)
    texts, stored = _read(path)
    if bad := _first_not_finite(stored):
        raise DheadsError(f"{path}: {bad} holds numbers that are not finite; take weights of an earlier step")
    expected = texts.pop("sha256", None)
    if _digest(texts, stored) != expected:
        raise DheadsError(f"{path} was altered after it was written: its checksum does not match; get it again")
    config, info = _parse(path, texts)
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    return Checkpoint(config, tensors, info, path)


def load(name_or_path: str, progress: bool = True) -> Checkpoint:
    """The checkpoint at that path or of that name in weights.toml; the authors' networks are converted to one.

    progress: whether a download shows a bar. Raises DheadsError for an unknown name, a licence that is not accepted,
    a download that fails, and a file that is damaged or of another kind.
    """
    path = resolve(name_or_path, progress)
    entry = listing.known().get(name_or_path, {})
    # A file that the user names is never opened as TorchScript, even where it has the name of known weights.
    if Path(name_or_path).is_file() or entry["kind"] != "released":
        return load_checkpoint(path)
    config, tensors = read_network(path, entry["network"])
    info = {"license": entry["license"], "data": [entry["purpose"]], "page": entry["page"]}
    return Checkpoint(config, tensors, info, path)


def build_model(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> ExtendedUNet:
    """The checkpoint's network in eval mode, float32. Raises DheadsError where tensors and configuration disagree."""
    try:
        # "meta" allocates nothing, so a hostile configuration fails at the tensors' shapes, not for lack of memory.
        with torch.device("meta"):
            unet = ExtendedUNet(checkpoint.config)
        unet.load_state_dict(checkpoint.tensors, assign=True)
    except DheadsError as error:
        raise DheadsError(f"{checkpoint.path} has a configuration that this version cannot use: {error}") from error
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[:2][-1].strip()  # the second line names the first tensor at fault
        raise DheadsError(f"the tensors of {checkpoint.path} do not fit its configuration: {reason}") from error
    return unet.eval().to(device)


def load_model(
    name_or_path: str, device: torch.device | str = "cpu", progress: bool = True
) -> tuple[ExtendedUNet, Config, dict[str, Any]]:
    """The network of a checkpoint, as `load` finds it, with its configuration and its training summary."""
    checkpoint = load(name_or_path, progress)
    return build_model(checkpoint, device), checkpoint.config, checkpoint.info


# --- The file


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors as stored."""
    if not path.is_file():
        raise DheadsError(f"there is no checkpoint file {path}")
    if path.suffix.lower() in {".pt", ".pth", ".ckpt"}:
        raise DheadsError(
            f"{path} is no safetensors file; dheads opens no others, as they may run code "
            "(the authors' released model is the weights 'crema')"
        )
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            if texts.get("format") != FORMAT:
                raise DheadsError(f"{path} is a safetensors file, but not a checkpoint of dheads ({FORMAT})")
            # Copies: the file is mapped into memory, and may change later.
            return texts, {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
    except OSError as error:
        raise DheadsError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise DheadsError(f"{path} is no safetensors file, or is cut off or altered: {error}") from error


def _parse(path: Path, texts: dict[str, str]) -> tuple[Config, dict[str, Any]]:
    """Configuration and training summary from the metadata."""
    try:
        values, info = json.loads(texts["config"]), json.loads(texts["info"])
    except (KeyError, ValueError, RecursionError) as error:
        raise DheadsError(f"{path} lacks a readable configuration; it is not a complete checkpoint") from error
    if not isinstance(info, dict):
        raise DheadsError(f"{path} lacks a readable training summary; it is not a complete checkpoint")
    try:
        return configuration.from_dict(values), info
    except DheadsError as error:
        raise DheadsError(f"{path} has a configuration that this version cannot use: {error}") from error


def _first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with NaN or infinities."""
    return next((name for name, tensor in sorted(tensors.items()) if not tensor.isfinite().all()), None)


def _digest(texts: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """sha256 over the metadata and every tensor's name, type, shape and bytes, in the order of their names."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
