"""Weights: the list of known ones, download, hash checks, checkpoint files, and the released models' names.

A checkpoint is one safetensors file that carries its complete configuration, so loading one needs a path only and
executes nothing. `weights.toml` lists the known sets; its hashes are checked whenever a listed file is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import json
import os
import re
import sys
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dheads import config as configuration
from dheads.config import ConditioningConfig, Config, DiffusionConfig, ModelConfig
from dheads.errors import DheadsError
from dheads.model import UNet

FORMAT = "dheads-1"
PACKAGE = Path(__file__).parent
ASSETS = PACKAGE / "assets"

_CHUNK = 1 << 20  # bytes read at a time
_TIMEOUT_SECONDS = 30


# --- Checkpoints


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What one checkpoint file holds."""

    config: Config
    tensors: dict[str, Tensor]  # float32, on the CPU
    info: dict[str, Any]  # training summary, data sources, licence
    path: Path  # for messages


def save_checkpoint(
    path: Path, tensors: dict[str, Tensor], config: Config, info: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write a checkpoint, with its floating-point tensors in `dtype`; the file appears only when it is complete."""
    stored = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous().clone()
        for name, tensor in tensors.items()
    }
    texts = {"format": FORMAT, "config": json.dumps(configuration.to_dict(config)), "info": json.dumps(info)}
    unfinished = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(stored, unfinished, metadata={**texts, "sha256": _digest(texts, stored)})
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise DheadsError(f"cannot write the checkpoint {path}: {error}") from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint. Raises DheadsError for a file that is absent, damaged or of another kind."""
    if not path.is_file():
        raise DheadsError(f"there is no checkpoint file {path}")
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


def build_model(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> UNet:
    """The checkpoint's network in eval mode, float32. Raises DheadsError where tensors and configuration disagree."""
    if not _is_sane(checkpoint.config):
        raise DheadsError(f"{checkpoint.path} is damaged: its configuration has sizes that no real model has")
    try:
        # On "meta" nothing is allocated: a hostile configuration meets the tensors' true shapes first.
        with torch.device("meta"):
            unet = UNet(checkpoint.config)
        unet.load_state_dict(checkpoint.tensors, assign=True)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[:2][-1].strip()  # the second line names the first tensor at fault
        raise DheadsError(f"the tensors of {checkpoint.path} do not fit its configuration: {reason}") from error
    return unet.eval().to(device)


def load_model(name_or_path: str, device: torch.device | str = "cpu") -> tuple[UNet, Config, dict[str, Any]]:
    """The network of a known name or a checkpoint file, with its configuration and its training summary."""
    checkpoint = load_checkpoint(resolve(name_or_path))
    return build_model(checkpoint, device), checkpoint.config, checkpoint.info


def _digest(texts: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """sha256 over the metadata and every tensor's name, type, shape and bytes, in the order of their names."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_sane(config: Config) -> bool:
    """Whether all sizes are a real model's, so that building and running it neither hangs nor exhausts the machine."""
    net, told, diffusion = config.model, config.conditioning, config.diffusion
    limits = [
        (net.image_size, 1, 2048),
        (net.model_channels, 1, 4096),
        (net.num_res_blocks, 1, 16),
        (len(net.channel_mult), 1, 8),
        (min(net.channel_mult, default=0), 1, 64),
        (max(net.channel_mult, default=0), 1, 64),
        (net.head_channels, 1, 4096),
        (net.patch_size, 1, 64),
        (net.max_period, 1, 1e9),
        (diffusion.num_steps, 1, 100_000),
        (diffusion.cosine_s, 0, 1),
        (diffusion.beta_max, 1e-6, 1 - 1e-6),
        (told.motion_frames, 0, 64),
        (told.audio_context, 0, 256),
        (told.speech_dim, 1, 16_384),
        (told.lip_dims, 0, 256),
        (told.lip_context, 0, 256),
        (config.alignment.eye_distance, 0.01, 1),
        (config.alignment.eye_y, 0, 1),
    ]
    return all(low <= value <= high for value, low, high in limits)


# --- Known weights


def known() -> dict[str, dict[str, Any]]:
    """The tables of weights.toml by name. In a wheel it lies inside the package, in a checkout one level up."""
    path = PACKAGE / "weights.toml"
    if not path.is_file():
        path = PACKAGE.parent / "weights.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def resolve(name_or_path: str, progress: bool = True) -> Path:
    """The checkpoint file of that path, or of that name in weights.toml: packaged, cached, or else downloaded now."""
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    models = {name: entry for name, entry in known().items() if entry["kind"] == "model"}
    if name_or_path not in models:
        names = ", ".join(sorted(models))
        raise DheadsError(f"weights {name_or_path!r} are neither a file nor a known name; the known names are: {names}")
    entry = models[name_or_path]
    packaged = ASSETS / entry["file"]
    if "url" not in entry:
        if not packaged.is_file() or file_sha256(packaged) != entry["sha256"]:
            raise DheadsError(f"the packaged weights {packaged} are missing or damaged; install dheads anew")
        return packaged
    cached = home() / entry["file"]
    if not cached.is_file() or file_sha256(cached) != entry["sha256"]:
        download(entry["url"], cached, entry["sha256"], entry["bytes"], progress)
    return cached


def home() -> Path:
    """The folder of downloaded weights: DHEADS_HOME, else `dheads` in the platform's cache folder."""
    if chosen := os.environ.get("DHEADS_HOME"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dheads"
    variable, default = ("LOCALAPPDATA", "AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", ".cache")
    return Path(os.environ.get(variable) or Path.home() / default) / "dheads"


def file_sha256(path: Path) -> str:
    """The file's sha256 as hex."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DheadsError(f"cannot read {path}: {error.strerror}") from error


# --- Download


def download(url: str, path: Path, sha256: str, size: int, progress: bool = True) -> None:
    """Fetch `size` bytes to `path`, going on where an earlier try stopped; it appears only with the right hash."""
    unfinished = path.with_name(f"{path.name}.part")
    by_hand = f"run again to go on, or put the file there by hand: {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, unfinished, size, progress)
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
        raise DheadsError(f"cannot download {url} ({error}); {by_hand}") from error
    if unfinished.stat().st_size < size:
        raise DheadsError(f"the download of {url} stopped early; {by_hand}")
    if unfinished.stat().st_size > size or file_sha256(unfinished) != sha256:
        unfinished.unlink()
        raise DheadsError(f"{url} is not the file that was expected (wrong size or sha256), so it was removed")
    os.replace(unfinished, path)


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and (parts.scheme, parts.hostname) not in {("http", "127.0.0.1"), ("http", "localhost")}:
        raise DheadsError(f"weights are downloaded over https only, not from {url}")


def _fetch(url: str, unfinished: Path, size: int, progress: bool) -> None:
    """Bring `unfinished` up to `size` bytes, or one more where the server has more to give."""
    _check_url(url)
    done = unfinished.stat().st_size if unfinished.exists() else 0
    if done >= size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.build_opener(_CheckedRedirects).open(request, timeout=_TIMEOUT_SECONDS) as response:
        if response.status != http.client.PARTIAL_CONTENT:  # the server sends the whole file again
            done = 0
        bar = tqdm(total=size, initial=done, unit="B", unit_scale=True, desc=unfinished.stem, disable=not progress)
        with bar, unfinished.open("ab" if done else "wb") as file:
            while done <= size and (chunk := response.read(min(_CHUNK, size + 1 - done))):
                file.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))


# --- The authors' released models

_RELEASED_PARTS = {
    "in_layers.0": "in_norm",
    "in_layers.2": "in_conv",
    "t_emb_layers.1": "time_affine",
    "audio_emb_layers.1": "audio_affine",
    "out_layers.0": "out_norm",
    "out_layers.3": "out_conv",
    "skip_connection": "skip",
    "norm": "norm",
    "qkv": "qkv",
    "proj_out": "proj",
}
_RELEASED_TOPS = {
    "time_embed.fc.0": "time_embed.0",
    "time_embed.fc.2": "time_embed.2",
    "audio_embed.0": "audio_embed.0",
    "audio_embed.2": "audio_embed.2",
    "input_blocks.0.0": "stem",
    "out.0": "out_norm",
    "out.2": "out_conv",
}
_RELEASED_BLOCK = re.compile(r"(?:(input|output)_blocks\.(\d+)|(middle)_block)\.(\d+)\.(.+)")
_TWICE = ("unet.", "diffusion.nn_backbone.")


def from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the released code under our names, from the plain form or the training branch's doubled one.

    Raises DheadsError for an unknown name, and where the two copies of the doubled form differ.
    """
    ours: dict[str, Tensor] = {}
    doubled = any(name.startswith(_TWICE) for name in state)
    for released, tensor in state.items():
        plain = released
        if doubled:
            prefix = next((prefix for prefix in _TWICE if released.startswith(prefix)), None)
            if prefix is None:  # tables of the diffusion and the like, which a configuration determines
                continue
            plain = released.removeprefix(prefix)
        module, _, leaf = plain.rpartition(".")
        name = f"{_rename_released(module)}.{leaf}"
        if name in ours and not torch.equal(ours[name], tensor):
            raise DheadsError(f"the released checkpoint holds two different copies of {plain}")
        ours[name] = tensor
    return ours


def _rename_released(module: str) -> str:
    if module in _RELEASED_TOPS:
        return _RELEASED_TOPS[module]
    match = _RELEASED_BLOCK.fullmatch(module)
    if match is None or match[5] not in _RELEASED_PARTS:
        raise DheadsError(f"{module} is no part of a released Diffused Heads network")
    side, block, middle, position, part = match.groups()
    is_attention = part in {"norm", "qkv", "proj_out"}
    kind = "attn" if is_attention else "up" if side == "output" and position != "0" else "res"
    if middle:  # residual block, attention, residual block
        return f"middle.{int(position) // 2}.{kind}.{_RELEASED_PARTS[part]}"
    layer = f"down.{int(block) - 1}" if side == "input" else f"up.{block}"  # input block 0 is the stem
    return f"{layer}.{kind}.{_RELEASED_PARTS[part]}"


def config_from_released(args: dict[str, Any], speech_dim: int = 256) -> Config:
    """The configuration of a network given by the released code's argument names; its embeddings have 256 numbers."""
    return Config(
        name="released",
        model=ModelConfig(
            image_size=args["image_size"],
            model_channels=args["model_channels"],
            channel_mult=tuple(args["channel_mult"]),
            num_res_blocks=args["num_res_blocks"],
            attn_resolutions=tuple(args["attention_resolutions"]),
            head_channels=args["num_head_channels"],
            dropout=args["dropout"],
            # exp(-ln(1e4) i / (2 C)) for i < C/2 is a period of 1e4^(1/4).
            max_period=10.0,
            learned_variance=args["out_channels"] == 2 * args["in_channels"],
        ),
        diffusion=DiffusionConfig(),
        conditioning=ConditioningConfig(
            motion_frames=args["n_motion_frames"],
            audio_context=args["n_audio_motion_embs"],
            speech_encoder="diffused-heads",
            speech_dim=speech_dim,
            grayscale_motion=args["grayscale_motion"],
        ),
        alignment=dataclasses.replace(configuration.AlignmentConfig(), landmarks="fan"),
    )
