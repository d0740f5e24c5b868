"""Where to compute: devices, their precision, and compilation for them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dheads.errors import DheadsError
from dheads.system.distributed import world

# Of torch.compile. On a CPU, GCC 12 vectorises the transposition of 32 x 32 bfloat16 in PyTorch's vec512_bfloat16.h
# wrongly at -O3: NaN wherever a layout changes. There is no option for flags, but the value of this one is pasted into
# the compiler's command line as it is.
COMPILE_OPTIONS: dict[str, str | int | bool | Callable] = {
    "cpp.enable_floating_point_contract_flag": "off -fno-tree-slp-vectorize"
}


def resolve_device(name: str) -> torch.device:
    """The device of that name; auto: CUDA, else MPS, else the CPU. Raises DheadsError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(name, False):
        raise DheadsError(f"device {name} is not available here; use {' or '.join(k for k, v in present.items() if v)}")
    return torch.device(name)


def own_device(device: torch.device) -> torch.device:
    """Of several GPUs the one of this process."""
    own = world().device(device.type)
    if own.type == "cuda":
        if own.index >= torch.cuda.device_count():
            raise DheadsError(
                f"torchrun started more processes here than there are GPUs; give it --nproc-per-node "
                f"{torch.cuda.device_count()}"
            )
        torch.cuda.set_device(own)
    return own


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
    return torch.float32
