"""Make the packaged weights of a training run: fp16, with licence and data sources, listed in weights.toml.

python recipes/pack.py run/weights.safetensors
"""

from __future__ import annotations

import hashlib
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import torch

from dheads.config import preset
from dheads.weights.checkpoints import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
NAME = "small"


def pack(trained: Path) -> None:
    listing = ROOT / "weights.toml"
    entry = tomllib.loads(listing.read_text(encoding="utf-8"))[NAME]
    checkpoint = load_checkpoint(trained)
    # How to sample is found out after the training; in how many steps, distilled weights know best.
    sampling = replace(preset(NAME).sampling, steps=checkpoint.config.sampling.steps)
    config = replace(checkpoint.config, sampling=sampling)
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
