"""The authors' released models: their archive, TorchScript files, the names of their tensors, what their network is.

A TorchScript file holds code, so `load_script` is for files whose sha256 was found to be the listed one.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dheads.config import ConditioningConfig, Config, DiffusionConfig, NetworkConfig, preset
from dheads.errors import DheadsError
from dheads.system.files import complete_or_absent

_CHUNK = 1 << 20  # bytes read at a time


# --- Files

# What zipfile throws at damaged, encrypted or unusual members.
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)


def unpack(archive: Path, folder: Path, wanted: list[dict[str, Any]], by_hand: str) -> None:
    """Put the wanted files (entries of weights.toml: file, bytes, sha256) of a zip archive into `folder`.

    They are found by their names, in whatever folder of the archive. Each appears only with the right hash. Raises
    DheadsError, which ends with `by_hand`: a file that is no zip archive is kept, one with other content removed.
    """
    try:
        bundle = zipfile.ZipFile(archive)
    except (*_DAMAGED, OSError) as error:
        raise DheadsError(f"{archive} is not the zip archive that was expected: delete it and {by_hand}") from error
    with bundle:
        bad = [entry["file"] for entry in wanted if not _extract(bundle, folder / entry["file"], entry)]
    if bad:
        archive.unlink()
        raise DheadsError(
            f"the archive holds no {' or '.join(bad)} of the right size and sha256, so it was removed; {by_hand}"
        )


def _extract(bundle: zipfile.ZipFile, path: Path, entry: dict[str, Any]) -> bool:
    """Whether one of the members of that name is the expected file, which then lies at `path`."""
    for member in bundle.infolist():
        if re.split(r"[/\\]", member.filename)[-1] != entry["file"] or member.file_size != entry["bytes"]:
            continue
        try:
            with complete_or_absent(path) as part:
                if _copy(bundle, member, part, entry["bytes"]) != entry["sha256"]:
                    raise zipfile.BadZipFile("another file of that name")
            return True
        except _DAMAGED:
            continue
        except OSError as error:
            raise DheadsError(f"cannot unpack {path}: {error.strerror or error}") from error
    return False


def _copy(bundle: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, size: int) -> str:
    """Unpack up to `size` bytes, whatever the archive claims; returns their sha256, or nothing if there are more."""
    digest = hashlib.sha256()
    with bundle.open(member) as source, path.open("wb") as file:
        while chunk := source.read(_CHUNK):
            size -= len(chunk)
            if size < 0:
                return ""
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def load_script(path: Path, device: torch.device | str = "cpu") -> torch.jit.ScriptModule:
    """The TorchScript module of a file that is known to be what it should be, in eval mode."""
    with warnings.catch_warnings():
        # torch would rather have us export anew; but this is the form that was released.
        warnings.filterwarnings("ignore", r"`torch\.jit\.load`", FutureWarning)
        try:
            script = torch.jit.load(path, map_location=device)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise DheadsError(f"this version of torch cannot open the TorchScript file {path}: {reason}") from error
    return script.eval()


def read_network(path: Path, args: dict[str, Any]) -> tuple[Config, dict[str, Tensor]]:
    """Configuration and float32 tensors, under our names, of a released network with the given released arguments."""
    state = from_released(load_script(path).state_dict())
    return config_from_released(args), {name: tensor.detach().float() for name, tensor in state.items()}


# --- Names

_PARTS = {
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
_TOPS = {
    "time_embed.fc.0": "time_embed.0",
    "time_embed.fc.2": "time_embed.2",
    "audio_embed.0": "audio_embed.0",
    "audio_embed.2": "audio_embed.2",
    "input_blocks.0.0": "stem",
    "out.0": "out_norm",
    "out.2": "out_conv",
}
_BLOCK = re.compile(r"(?:(input|output)_blocks\.(\d+)|(middle)_block)\.(\d+)\.(.+)")
_PREFIXES = ("unet.", "diffusion.nn_backbone.")


def from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the released code under our names, from the plain form or the training branch's doubled one.

    Raises DheadsError for an unknown name, and where the two copies of the doubled form differ.
    """
    ours: dict[str, Tensor] = {}
    prefixed = any(name.startswith(_PREFIXES) for name in state)
    for released, tensor in state.items():
        plain = released
        if prefixed:
            prefix = next((prefix for prefix in _PREFIXES if released.startswith(prefix)), None)
            if prefix is None:  # tables of the diffusion and the like, which a configuration determines
                continue
            plain = released.removeprefix(prefix)
        module, _, leaf = plain.rpartition(".")
        name = f"{_rename(module)}.{leaf}"
        if name in ours and not torch.equal(ours[name], tensor):
            raise DheadsError(f"the released checkpoint holds two different copies of {plain}")
        ours[name] = tensor
    return ours


def _rename(module: str) -> str:
    if module in _TOPS:
        return _TOPS[module]
    match = _BLOCK.fullmatch(module)
    if match is None or match[5] not in _PARTS:
        raise DheadsError(f"{module} is no part of a released Diffused Heads network")
    side, block, middle, position, part = match.groups()
    is_attention = part in {"norm", "qkv", "proj_out"}
    kind = "attn" if is_attention else "up" if side == "output" and position != "0" else "res"
    if middle:  # residual block, attention, residual block
        return f"middle.{int(position) // 2}.{kind}.{_PARTS[part]}"
    layer = f"down.{int(block) - 1}" if side == "input" else f"up.{block}"  # input block 0 is the stem
    return f"{layer}.{kind}.{_PARTS[part]}"


# --- Configuration


def config_from_released(args: dict[str, Any]) -> Config:
    """The configuration of a network given by the released code's argument names."""
    return Config(
        name="released",
        network=NetworkConfig(
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
            speech_dim=args["model_channels"],  # the released code knows embeddings of this width only
            grayscale_motion=args["grayscale_motion"],
        ),
        alignment=preset("crema").alignment,
    )
