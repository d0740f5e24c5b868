"""Weights: checkpoint files, the list of known weights, their licences and hash checks.

A checkpoint is one safetensors file that carries its complete configuration, so loading one needs a path only and
executes nothing. `weights.toml` lists the known sets; its hashes are checked whenever a listed file is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tomllib
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
from dheads.weights.download import download, file_sha256, own_turn, receive, size_of
from dheads.weights.released import read_network, unpack

FORMAT = "dheads-1"
PACKAGE = Path(__file__).parents[1]
ASSETS = PACKAGE / "assets"

_LARGEST_ARCHIVE = 2 << 30  # bytes; the size of an archive is the server's word only


# --- Checkpoints


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What one checkpoint file holds."""

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


def _first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of a tensor with NaN or infinities in it."""
    return next((name for name, tensor in sorted(tensors.items()) if not tensor.isfinite().all()), None)


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read and check a checkpoint. Raises DheadsError for a file that is absent, damaged or of another kind."""
    path = Path(path)
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
            stored = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
    except OSError as error:
        raise DheadsError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise DheadsError(f"{path} is no safetensors file, or is cut off or altered: {error}") from error
    if bad := _first_not_finite(stored):
        raise DheadsError(f"{path}: {bad} holds numbers that are not finite; take weights of an earlier step")
    claimed = texts.pop("sha256", None)
    if _digest(texts, stored) != claimed:
        raise DheadsError(f"{path} was altered after it was written: its checksum does not match; get it anew")
    try:
        values, info = json.loads(texts["config"]), json.loads(texts["info"])
    except (KeyError, ValueError, RecursionError) as error:
        raise DheadsError(f"{path} lacks a readable configuration; it is not a complete checkpoint") from error
    if not isinstance(info, dict):
        raise DheadsError(f"{path} lacks a readable training summary; it is not a complete checkpoint")
    try:
        config = configuration.from_dict(values)
    except DheadsError as error:
        raise DheadsError(f"{path} has a configuration that this version cannot use: {error}") from error
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    return Checkpoint(config, tensors, info, path)


def build_model(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> ExtendedUNet:
    """The checkpoint's network in eval mode, float32. Raises DheadsError where tensors and configuration disagree."""
    try:
        # On "meta" nothing is allocated: a hostile configuration meets the tensors' true shapes first.
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
    """The network of a known name or a checkpoint file, with its configuration and its training summary."""
    checkpoint = load(name_or_path, progress)
    return build_model(checkpoint, device), checkpoint.config, checkpoint.info


def load(name_or_path: str, progress: bool = True) -> Checkpoint:
    """The checkpoint of a file or of a known name; the authors' released models become one too."""
    path = resolve(name_or_path, progress)
    entry = known().get(name_or_path, {})
    # A file that the user names is never opened as TorchScript, whatever it is called.
    if Path(name_or_path).is_file() or entry["kind"] != "released":
        return load_checkpoint(path)
    config, tensors = read_network(path, entry["network"])
    info = {"license": entry["license"], "data": [entry["purpose"]], "page": entry["page"]}
    return Checkpoint(config, tensors, info, path)


def _digest(texts: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """sha256 over the metadata and every tensor's name, type, shape and bytes, in the order of their names."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# --- Known weights


def known() -> dict[str, dict[str, Any]]:
    """The tables of weights.toml by name. In a wheel it lies inside the package, in a checkout one level up."""
    path = PACKAGE / "weights.toml"
    if not path.is_file():
        path = PACKAGE.parent / "weights.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def resolve(name_or_path: str, progress: bool = True) -> Path:
    """The file of that path, or of the model of that name in weights.toml: packaged, cached, or else downloaded now."""
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    models = [name for name, entry in known().items() if entry["kind"] in {"model", "released"}]
    if name_or_path not in models:
        names = ", ".join(sorted(models))
        raise DheadsError(f"weights {name_or_path!r} are neither a file nor a known name; the known names are: {names}")
    return fetch(name_or_path, progress)


def fetch(name: str, progress: bool = True) -> Path:
    """The file of that name in weights.toml, its hash checked. Raises DheadsError until its licence is accepted."""
    entry = known()[name]
    if _asks(entry):
        raise DheadsError(f"{_question(name, entry)}; run again with --accept-license to accept")
    if "url" not in entry and "archive" not in entry:
        packaged = ASSETS / entry["file"]
        if not _is_listed(packaged, entry):
            raise DheadsError(f"the packaged weights {packaged} are missing or damaged; install dheads anew")
        return packaged
    cached = home() / entry["file"]
    if _is_listed(cached, entry):
        return cached
    with own_turn(home()):
        if _is_listed(cached, entry):  # by the process that was waited for
            return cached
        if "archive" in entry:
            _fetch_archive(entry["archive"], progress)
        else:
            download(entry["url"], cached, entry["sha256"], entry["bytes"], progress)
    return cached


def cached(name: str) -> Path | None:
    """The file of that name in weights.toml where the cache folder holds it, its hash checked; nothing is fetched."""
    entry = known()[name]
    path = home() / entry["file"]
    return path if _is_listed(path, entry) else None


def _is_listed(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and file_sha256(path) == entry["sha256"]


def home() -> Path:
    """The folder of downloaded weights: DHEADS_HOME, else `dheads` in the platform's cache folder."""
    try:
        if chosen := os.environ.get("DHEADS_HOME"):
            return Path(chosen).expanduser()
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "dheads"
        windows = sys.platform == "win32"
        variable, default = ("LOCALAPPDATA", "AppData/Local") if windows else ("XDG_CACHE_HOME", ".cache")
        return Path(os.environ.get(variable) or Path.home() / default) / "dheads"
    except RuntimeError:  # neither HOME nor an entry of this user in the system's list
        raise DheadsError("this user has no home folder to keep weights in; set DHEADS_HOME to a folder") from None


# --- Licences


def consent(name: str) -> str | None:
    """What a user must be shown before the named weights or speech encoder are used; None if nothing, or accepted.

    A checkpoint's path stands for its speech encoder.
    """
    name = _asked_name(name)
    entry = known().get(name, {})
    return _question(name, entry) if _asks(entry) else None


def accept(name: str) -> None:
    """Remember that the user accepts the licence of the named weights, and of all others from the same page."""
    entry = known().get(_asked_name(name), {})
    if not _asks(entry):
        return
    path = home() / "accepted.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_or_absent(path) as part:
            part.write_text(json.dumps({**_accepted(), entry["page"]: entry["license"]}, indent=2), encoding="utf-8")
    except OSError as error:
        raise DheadsError(f"cannot write {path}: {error.strerror}") from error


def _asks(entry: dict[str, Any]) -> bool:
    return entry.get("ask", False) and _accepted().get(entry["page"]) != entry["license"]


def _question(name: str, entry: dict[str, Any]) -> str:
    return f"{name}: {entry['purpose']} Its licence is {entry['license']}: {entry['terms']} Source: {entry['page']}"


def _asked_name(name: str) -> str:
    return _speech_encoder_of(Path(name)) if Path(name).is_file() else name


def _speech_encoder_of(path: Path) -> str:
    """What a checkpoint names, read from its metadata only; nothing for what is none, which loading will say."""
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})["config"])
        return str(values["conditioning"]["speech_encoder"])
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError):
        return ""


def _accepted() -> dict[str, str]:
    """Licence by page."""
    try:
        accepted = json.loads((home() / "accepted.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return accepted if isinstance(accepted, dict) else {}


# --- Archives


def _fetch_archive(url: str, progress: bool = True) -> None:
    """Fetch and unpack an archive, and put all its listed files that are not there yet into the cache."""
    entries = [entry for entry in known().values() if entry.get("archive") == url]
    missing = [entry for entry in entries if not _is_listed(home() / entry["file"], entry)]
    names = " and ".join(str(home() / entry["file"]) for entry in missing)
    by_hand = f"get the archive at {missing[0]['page']} with a browser, unpack it and put its files there: {names}"
    archive = (home() / entries[0]["file"]).with_suffix(".zip")
    if not archive.is_file():
        unfinished = archive.with_name(f"{archive.name}.part")
        total = receive(url, unfinished, _LARGEST_ARCHIVE, f"run again to go on, or {by_hand}", progress)
        largest = _LARGEST_ARCHIVE if total is None else min(total, _LARGEST_ARCHIVE)
        if total is not None and size_of(unfinished) < largest:
            raise DheadsError(f"the download of {url} stopped early; run again to go on, or {by_hand}")
        if size_of(unfinished) > largest:
            unfinished.unlink()
            raise DheadsError(f"{url} gives more than the archive that was expected, so it was removed; {by_hand}")
        os.replace(unfinished, archive)
    unpack(archive, home(), missing, by_hand)
    archive.unlink()
