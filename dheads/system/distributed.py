"""Training in several processes: their ranks under torchrun, and the group in which they exchange gradients."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dheads.errors import DheadsError

# The others wait while the main process fits the lip code, validates and makes sample videos.
_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True, slots=True)
class World:
    """The rank of this process among all that torchrun started; one process where it did not."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def own_shard(self, shard: tuple[int, int] | None) -> tuple[int, int] | None:
        """This process's part of a list, (i, n) for the i-th of n parts, counted from 1; None for the whole list.

        `shard` is the part that the user asks for; without one, torchrun's processes each take their own. Raises
        DheadsError for a part that does not exist, and for both at once.
        """
        if shard is None:
            return (self.rank + 1, self.size) if self.size > 1 else None
        if self.size > 1:
            raise DheadsError("--shard and torchrun both divide the work; use one of them")
        if not 1 <= shard[0] <= shard[1]:
            raise DheadsError(f"there is no shard {shard[0]}/{shard[1]}; shards count from 1")
        return shard

    def device(self, name: str) -> torch.device:
        """This process's device of type `name`: with several GPUs, the one of its local rank."""
        return torch.device(name, self.local_rank) if name == "cuda" else torch.device(name)

    def take_device(self, name: str) -> torch.device:
        """As `device`, made torch's current device where it is a GPU.

        Raises DheadsError where torchrun started more processes on this machine than it has GPUs.
        """
        own = self.device(name)
        if own.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise DheadsError(
                    f"{self.local_size} processes were started here, but there are {torch.cuda.device_count()} GPUs; "
                    "give torchrun that number as --nproc-per-node"
                )
            torch.cuda.set_device(own)
        return own

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network, with gradients averaged over all processes."""
        if self.size == 1:
            return network
        device = next(network.parameters()).device
        own = [device] if device.type == "cuda" else None
        return DistributedDataParallel(network, own, gradient_as_bucket_view=True)

    def apart(self, network: nn.Module) -> AbstractContextManager[None]:
        """A block whose backward pass adds gradients up locally; they are exchanged in a later backward pass."""
        return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()

    def total(self, values: Tensor) -> Tensor:
        """Sum `values` over all processes, in place in each of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Copy the main process's values into the tensors of all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: object) -> list[object]:
        """The values of all processes, by rank; for small objects."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def world() -> World:
    """This process's ranks, from the environment that torchrun sets. Raises DheadsError where it is not numbers."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(name in os.environ for name in names):
        return World()
    try:
        return World(*(int(os.environ[name]) for name in names))
    except ValueError as error:
        raise DheadsError(f"{', '.join(names)} must be numbers; let torchrun set them ({error})") from error


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join all processes in one group for the block, which they leave together.

    device: its type, cpu or cuda. Only once in a process: a second group would find the addresses of the first.
    Raises DheadsError where the processes do not find each other.
    """
    here = world()
    if here.size == 1:
        yield here
        return
    if device not in ("cpu", "cuda"):
        raise DheadsError(f"several processes can train on cuda or cpu, not on {device}; choose another --device")
    own = here.take_device(device)
    try:
        dist.init_process_group(
            "nccl" if own.type == "cuda" else "gloo", timeout=_TIMEOUT, device_id=own if own.type == "cuda" else None
        )
    except (RuntimeError, ValueError) as error:  # no address, or no process there
        raise DheadsError(
            f"the {here.size} processes do not find each other; start them by torchrun ({error})"
        ) from error
    try:
        yield here
        dist.barrier()
    finally:
        dist.destroy_process_group()
