"""Several processes that work as one: who is who under torchrun, and the group in which they exchange gradients."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dheads.errors import DheadsError

# The others wait while the main process fits the lip code, validates and makes sample videos.
_PATIENCE = timedelta(hours=2)

log = logging.getLogger("dheads")


@dataclass(frozen=True, slots=True)
class World:
    """This process among all: alone unless torchrun started it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and speaks to the user."""
        return self.rank == 0

    def own_shard(self, shard: tuple[int, int] | None) -> tuple[int, int] | None:
        """(i, n): the i-th of n parts of a list, counted from 1: the one asked for, else torchrun's; None: all.

        Raises DheadsError for a part that there is not, and where both ask.
        """
        if shard is None:
            return (self.rank + 1, self.size) if self.size > 1 else None
        if self.size > 1:
            raise DheadsError("--shard and torchrun both part the work; use one of them")
        if not 1 <= shard[0] <= shard[1]:
            raise DheadsError(f"there is no shard {shard[0]}/{shard[1]}; shards count from 1")
        return shard

    def device(self, name: str) -> torch.device:
        """This process's own device of that kind: of several GPUs the one of its local rank."""
        return torch.device(name, self.local_rank) if name == "cuda" else torch.device(name)

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network with gradients that are the mean over all processes."""
        if self.size == 1:
            return network
        device = next(network.parameters()).device
        own = [device] if device.type == "cuda" else None
        return DistributedDataParallel(network, own, gradient_as_bucket_view=True)

    def apart(self, network: nn.Module) -> AbstractContextManager[None]:
        """The time of a backward pass whose gradients are only added up, to be exchanged with a later one's."""
        return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place; every process gets it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give the main process's values to all, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: object) -> list[object]:
        """Everyone's small value, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def world() -> World:
    """Who this process is, by the environment that torchrun gives it. Raises DheadsError where that is garbled."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(name in os.environ for name in names):
        return World()
    try:
        return World(*(int(os.environ[name]) for name in names))
    except ValueError as error:
        raise DheadsError(f"{', '.join(names)} must be numbers; let torchrun set them ({error})") from error


@contextmanager
def joined(device: str) -> Iterator[World]:
    """All processes of the world in one group for the time of the block, which they leave together.

    device: the kind, cpu or cuda. Once in the life of a process: a second group would find the first one's addresses.
    Raises DheadsError where the processes do not find each other.
    """
    here = world()
    if here.size == 1:
        yield here
        return
    if device not in ("cpu", "cuda"):
        raise DheadsError(f"several processes can train on cuda or cpu, not on {device}; choose another --device")
    own = here.device(device)
    if own.type == "cuda":
        if here.local_rank >= torch.cuda.device_count():
            raise DheadsError(
                f"{here.local_size} processes were started here, but there are {torch.cuda.device_count()} GPUs; "
                "give torchrun that number as --nproc-per-node"
            )
        torch.cuda.set_device(own)
    try:
        dist.init_process_group(
            "nccl" if own.type == "cuda" else "gloo", timeout=_PATIENCE, device_id=own if own.type == "cuda" else None
        )
    except (RuntimeError, ValueError) as error:  # no address, or nobody there
        raise DheadsError(
            f"the {here.size} processes do not find each other; start them by torchrun ({error})"
        ) from error
    try:
        yield here
        dist.barrier()
    finally:
        dist.destroy_process_group()


class Ending:
    """Notes the first SIGTERM, SIGHUP or Ctrl-C within its block, so that what is under way can be finished and saved.

    The signal takes effect when the block ends, a second one at once. One that is ignored, as in a shell's background,
    stays so.
    """

    def __init__(self) -> None:
        self.asked = False
        self._signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
            for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self.asked:
            signal.raise_signal(self._signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self._signal = number
            self.__exit__()
        log.warning("ending after this step; once more to end at once, without saving")
        self.asked, self._signal = True, number
