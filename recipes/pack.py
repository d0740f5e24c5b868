"""Turn a checkpoint into the packaged weights: fp16, with licence and data sources, and listed in weights.toml.

python recipes/pack.py run/weights.safetensors
"""

from __future__ import annotations

import hashlib
import re
import sys
import tomllib
from pathlib import Path

import torch

from dheads.config import Config, override, preset, to_dict
from dheads.weights.checkpoints import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
NAME = "small"


# Keys of extensions that change sampling only, by table.
SAMPLING = {
    "warp": ("favour",),
    "motion": ("sampling_noise", "anchor"),
    "noise": ("shared", "outer_shared", "temperature", "outer_temperature", "pause_shared", "warm_steps"),
    "sound": ("guidance", "room_noise"),
}


def with_sampling_of(chosen: Config, trained: Config) -> Config:
    """The configuration of the training with the sampling settings of `chosen`, which may be newer.

    The number of steps stays, as weights are distilled for it.
    """
    values = to_dict(chosen)
    extensions = {table: {key: values["extensions"][table][key] for key in keys} for table, keys in SAMPLING.items()}
    extensions["codes"] = {
        name: {"event_rate": code.event_rate, "gain": code.gain, "shown": code.shown}
        for name, code in chosen.extensions.codes.items()
        if name in trained.extensions.codes
    }
    sampling = values["sampling"] | {"steps": trained.sampling.steps}
    return override(trained, {"sampling": sampling, "extensions": extensions})


def pack(trained: Path) -> None:
    listing = ROOT / "weights.toml"
    entry = tomllib.loads(listing.read_text(encoding="utf-8"))[NAME]
    checkpoint = load_checkpoint(trained)
    config = with_sampling_of(preset(NAME), checkpoint.config)
    info = {**checkpoint.info, **{key: entry[key] for key in ("license", "purpose", "data")}}
    target = ROOT / "dheads" / "assets" / entry["file"]
    save_checkpoint(target, checkpoint.tensors, config, info, torch.float16)
    packed = target.read_bytes()
    text = listing.read_text(encoding="utf-8")
    head, table, rest = text.partition(f"[{NAME}]\n")
    rest = re.sub(r"^bytes = .*$", f"bytes = {len(packed)}", rest, count=1, flags=re.M)
    rest = re.sub(r"^sha256 = .*$", f'sha256 = "{hashlib.sha256(packed).hexdigest()}"', rest, count=1, flags=re.M)
    listing.write_text(head + table + rest, encoding="utf-8")


if __name__ == "__main__":
    pack(Path(sys.argv[1]))
