"""Where this process stands among the processes of ``torchrun``, and the few collectives training needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError

__all__ = ["World", "pick_device", "world"]


@dataclass(frozen=True)
class World:
    """Rank, number of processes and device of this process; every method is a no-op for one process."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_primary(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def add_up(self, sums: Tensor) -> Tensor:
        """The elementwise sum over all processes, on the device of ``sums``; ``sums`` is kept."""
        if self.size == 1:
            return sums
        total = sums.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(sums.device)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in some process."""
        if self.size == 1:
            return flag
        return bool(self.add_up(torch.tensor(float(flag))))

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


def pick_device(name: str | None) -> torch.device:
    """``name`` as a device; by default CUDA where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("its tensors have no values.")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"The device {name!r} cannot be used here: {reason} Try cpu.") from None
    return device


@contextmanager
def world(device_name: str | None) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, or be alone; leave them at the end.

    A process group that the caller has set up is used and left running.
    """
    device = pick_device(device_name)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and not dist.is_initialized():
        yield World(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    joined = not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
    finally:
        if joined:
            dist.destroy_process_group()
