"""The ranks of a run, and the collectives between them.

Order of collectives: every rank must start the same collectives in the same order, or the run hangs. Gathers follow
the order of visits, and so do reductions, but how the two interleave depends on how fast a drive is. Over gloo each
kind has a process group of its own, so that does not matter. NCCL's collectives are kernels that hold the device until
all ranks have come: two communicators in different orders block each other, as soon as anything makes a device wait for
all that it has been given. So over NCCL both kinds share one communicator, and begin in one order
(traffic/one_order.py). A few numbers now and then travel in a group of their own, from CPU memory.

gloo's own all-gather and reduce-scatter copy what they move, once or twice. A broadcast, or a reduction, of each rank's
slice copies nothing, and sends the same bytes over every link. On one machine a gather takes a third of the time that
way, and a reduction 0.4 to 0.55 of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from zinf_cli.engine import meeting
from zinf_cli.tiers.streams import Event
from zinf_cli.tiers.tier import DONE, Transfer
from zinf_cli.trace import Trace

# torch 2.13 has new names for these
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Ranks:
    """This rank's place among `world_size`; without process groups, a world of one."""

    rank: int = 0
    world_size: int = 1
    whole: bool = False
    """Whether the backend moves a flat in one collective, and needs one order of all of them (NCCL). Over gloo a flat
    is moved a slice at a time, and gathers and reductions each have their own order."""
    gather_group: Any = None
    reduce_group: Any = None
    control_group: Any = None

    @classmethod
    def join(cls, device: torch.device, timeout_s: float = 600.0) -> Ranks:
        """Join the other ranks (RANK and WORLD_SIZE in the environment), over NCCL or gloo.

        They meet where meeting.py says, or else where torchrun's variables do. A collective that waits for a peer
        longer than `timeout_s` fails.
        """
        nccl = device.type == "cuda"
        timeout = timedelta(seconds=timeout_s)
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            timeout=timeout,
            store=meeting.store(timeout),
            rank=rank,
            world_size=world_size,
        )
        gather = dist.new_group(timeout=timeout)
        reduce = gather if nccl else dist.new_group(timeout=timeout)
        return cls(rank, world_size, nccl, gather, reduce, dist.group.WORLD)

    def gather(self, flat: torch.Tensor, own_slice: torch.Tensor, trace: Trace, label: str) -> Transfer:
        """Start filling `flat` (1-D, divisible by world_size) with every rank's slice.

        `own_slice` (1-D, of the flat's dtype) is this rank's; it may be this rank's range of `flat`.
        """
        if self.world_size == 1:
            return DONE
        if self.whole:
            works = [_all_gather(flat, own_slice, group=self.gather_group, async_op=True)]
        else:
            slices = flat.chunk(self.world_size)
            if slices[self.rank].data_ptr() != own_slice.data_ptr():
                slices[self.rank].copy_(own_slice)
            works = [
                dist.broadcast(part, rank, group=self.gather_group, async_op=True) for rank, part in enumerate(slices)
            ]
        return Collective(works, trace, "gather", label, flat.numel() * flat.element_size())

    def reduce_scatter(self, flat: torch.Tensor, trace: Trace, label: str) -> Transfer:
        """Start summing `flat` (1-D, divisible by world_size) over ranks: each rank gets the sum of its own range.

        The rest of `flat` holds no meaningful values afterwards.
        """
        if self.world_size == 1:
            return DONE
        slices = flat.chunk(self.world_size)
        if self.whole:
            works = [_reduce_scatter(slices[self.rank], flat, group=self.reduce_group, async_op=True)]
        else:
            works = [
                dist.reduce(part, rank, group=self.reduce_group, async_op=True) for rank, part in enumerate(slices)
            ]
        return Collective(works, trace, "reduce", label, flat.numel() * flat.element_size())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a CPU tensor (any shape and dtype), in place."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control_group)
        return values

    def totals(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over ranks."""
        return self.sum(torch.tensor(values, dtype=torch.float64)).tolist() if self.world_size > 1 else list(values)

    def any(self, flags: Sequence[bool]) -> Flags:
        """Start telling the other ranks. The result says which flags are set on any rank."""
        values = torch.tensor(flags, dtype=torch.int32)
        work = None
        if self.world_size > 1:
            work = dist.all_reduce(values, group=self.control_group, async_op=True)
        return Flags(values, work)

    def least(self, number: int) -> Least:
        """Start telling the other ranks. The result is the least of all ranks' numbers."""
        value = torch.tensor(number)
        return Least(value, dist.all_reduce(value, dist.ReduceOp.MIN, group=self.control_group, async_op=True))

    def all(self, number: int) -> list[int]:
        """Every rank's number, in the order of ranks."""
        numbers = torch.zeros(self.world_size, dtype=torch.int64)
        numbers[self.rank] = number
        return [int(value) for value in self.sum(numbers)]

    def leave(self) -> None:
        """Destroy the process groups. Every rank has to call this."""
        if self.world_size > 1:
            dist.destroy_process_group()


@dataclass(frozen=True)
class Flags:
    """Flags on their way between ranks; `wait` gives them."""

    values: torch.Tensor
    work: Any

    def done(self) -> bool:
        """Whether `wait` returns at once."""
        return self.work is None or bool(self.work.is_completed())

    def wait(self) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        if self.work is not None:
            self.work.wait()
        return self.told

    @property
    def told(self) -> list[bool]:
        """What `wait` has given."""
        return [bool(value) for value in self.values]


@dataclass(frozen=True)
class Least:
    """A number on its way between ranks; `wait` gives the least one."""

    value: torch.Tensor
    work: Any

    def wait(self) -> int:
        self.work.wait()
        return int(self.value)


class Collective:
    """A collective under way, as one or several of torch's."""

    event: Event | None = None

    def __init__(self, works: Sequence[Any], trace: Trace, lane: str, label: str, num_bytes: int) -> None:
        self.what = f"{lane} {label}"
        self._works = works
        self._span = (trace, lane, label, num_bytes)
        self._start = time.perf_counter()
        self._waited = False

    def done(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        if not self._waited:
            for work in self._works:
                work.wait()
            self._waited = True
            trace, lane, label, num_bytes = self._span
            trace.add(lane, label, self._start, time.perf_counter(), num_bytes)
