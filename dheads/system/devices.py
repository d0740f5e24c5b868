"""Where to compute: the device, its precision, and the options of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dheads.errors import DheadsError
from dheads.system.distributed import world

# For torch.compile on a CPU. GCC 12 at -O3 miscompiles the transposition of 32 x 32 bfloat16 in PyTorch's
# vec512_bfloat16.h: NaN wherever a layout changes. PyTorch has no option for compiler flags, but pastes the value of
# this one into the compiler's command line as it is.
COMPILE_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp.enable_floating_point_contract_flag": "off -fno-tree-slp-vectorize"
}


def resolve_device(name: str) -> torch.device:
    """The device of that name: cpu, cuda, mps, or auto for CUDA, else MPS, else the CPU.

    Raises DheadsError where it is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(name, False):
        raise DheadsError(f"device {name} is not available here; use {' or '.join(k for k, v in present.items() if v)}")
    return torch.device(name)


def own_device(device: torch.device) -> torch.device:
    """The device of that type for this process: under torchrun every process has its own GPU."""
    return world().take_device(device.type)


def described(device: torch.device) -> str:
    """Where a run computes, for a message: "on the CPU", "on the GPU (NVIDIA H100)"."""
    if device.type == "cuda":
        return f"on the GPU ({torch.cuda.get_device_name(device)})"
    return "on the CPU" if device.type == "cpu" else "on the GPU"


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        return torch.bfloat16 if fast else torch.float32
    return torch.float32


def usable_precision(precision: str, device: torch.device) -> str:
    """precision, "fp32" or "bf16", but "fp32" on devices without bfloat16 arithmetic: emulated, a step would take ten
    times as long."""
    return precision if best_dtype(device) == torch.bfloat16 else "fp32"
