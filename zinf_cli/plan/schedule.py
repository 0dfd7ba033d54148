"""A training step as data: operations of one rank, each with its lane, its amount and what it waits for.

All ranks do the same at the same time. So one stands for all, with its share of what the ranks of a host use together.
This is zinf's sweep (docs/architecture.md, "The sweep" and "The deferred update"). classic.py states ZeRO-Infinity's
schedule in the same words, and simulate.py plays both.

Amounts are bytes on a lane that moves them, FLOPs of compute ("matmul") and parameters of AdamW ("adamw"). Memory
bounds AdamW, and it bounds other updates and the clearing, adding and measuring of a gradient too. Their bytes are
counted as parameters of AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from zinf_cli.model_state import ADAMW, FP32_BYTES, GRAD, ITEM_BYTES, OptimizerState

LANES = ("compute", "update", "network", "copy in", "copy out", "nvme read", "nvme write")
"""zinf's updates run on the compute lane. The lane "update" is the CPU in the paper's schedule."""
ADAMW_BYTES = ADAMW.moved_bytes_per_param
"""Bytes per parameter of AdamW, whose measured speed tells the speed of other work that memory bounds."""
GLUE = {False: 15, True: 3}
"""By whether there is an accelerator: bytes that code between units moves for each that it saves, in forward and again
in backward. On a CPU one core computes it, in small operations: measured with tensors of 256 KiB. On an accelerator
each byte is written, and read twice."""
UNPACKED_BYTES = 8
"""What it costs to unpack a parameter, in bytes that memory moves. On one core of a shared CPU, beside AdamW and its 28
bytes: 4 to 6 into bf16, 4 to 18 into fp32."""
PIECES = 4
"""The most pieces that a schedule cuts an update into; the engine's chunks are finer."""


class Op(NamedTuple):
    """Something that one lane does, without a break, once all operations of `after` (places in the list) are done."""

    lane: str
    rate: str
    """The speed that it has: of a lane by its name, "matmul", "adamw" or "inside" (the network within a host)."""
    name: str
    amount: float
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class UnitLoad:
    """One unit, in the order of the forward pass.

    `params` and `trainable` count the whole unit; `flops` and bytes are of one micro-batch on one rank.
    """

    name: str
    params: float
    trainable: float
    flops: float
    """FLOPs of the forward pass."""
    kept_bytes: float
    """Bytes that it sends to the tier of activations."""
    recomputed: float = 1.0
    """The share of its forward that the backward pass computes again."""
    again: float = 0.0
    """The share of its forward that backward computes once more: MLPs in chunks of tokens."""
    glue_bytes: float = 0.0
    """Bytes that autograd saves in the code between the unit before and this one."""
    share: float = 1.0
    """The share of sweeps that visit it: less than 1 for experts."""
    cached: frozenset[str] = frozenset()
    """Classes of its state that lie on the step's `cache_tier`, whatever their placement."""
    back_bytes: float | None = None
    """Bytes that its backward brings back from the tier of activations; None for `kept_bytes`."""
    passes: float = 3.0
    """What forward and backward take, as a multiple of forward: the gradients of its parameters are one."""
    learns: bool = True
    """Whether it has a backward."""
    frozen_bytes: float | None = None
    """Of its frozen parameters, on their tier and between ranks; None: as many for each as compute uses."""
    unpacked: float = 0.0
    """Frozen parameters that each visit unpacks (engine/packed.py)."""
    moment_bytes: float | None = None
    """What the optimizer keeps of it; None: as much as of others."""
    update_flops: float = 0.0
    """What its update computes beside what it does with each element."""


@dataclass(frozen=True)
class Step:
    """One step, apart from the speed of any machine."""

    units: Sequence[UnitLoad]
    micro_batches: int
    per_sweep: int
    world_size: int
    placement: Mapping[str, str]
    accelerator: bool
    cache_tier: str = "cpu"
    """Where the state of cached units lies."""
    dtype: str = "BF16"
    """Of parameters as compute uses them, in the words of safetensors."""
    grad_bytes: float = GRAD.item_bytes
    """Bytes of one parameter's gradient as it goes to its tier."""
    optimizer: OptimizerState = ADAMW
    update: str = "deferred"
    """When a unit is updated: see Choice. With "speculative", the step is an unclipped one. With "in vain", it is
    clipped after all, and what backward has updated is updated in the next forward once more."""
    depth: int = 4
    """How many visits fit into memory, the one that is computed included."""
    chunk_params: float = 8 * 2**20
    """How many parameters of an update may be under way at once."""
    exchange_bytes: float = 0
    """Bytes of activations that model parallelism all-reduces within a host in a unit's forward pass (classic.py)."""

    @property
    def param_bytes(self) -> int:
        """Bytes of one parameter."""
        return ITEM_BYTES[self.dtype]


@dataclass
class Ops:
    """The list of operations as it grows. Methods return places in it: what to wait for."""

    step: Step
    ops: list[Op] = field(default_factory=list)

    def add(self, lane: str, name: str, amount: float, after: Sequence[int], rate: str | None = None) -> int:
        """Add one operation: see Op. Without a `rate`, it has the speed of its lane."""
        self.ops.append(Op(lane, rate or lane, name, amount, tuple(after)))
        return len(self.ops) - 1

    def bring(self, state: str, unit: UnitLoad, num_bytes: float, after: Sequence[int]) -> list[int]:
        """Move bytes of a unit's `state` from its tier to the compute device."""
        return self._move(self._way(state, unit, "nvme read", "copy in"), f"{unit.name} {state}", num_bytes, after)

    def send(self, state: str, unit: UnitLoad, num_bytes: float, after: Sequence[int]) -> list[int]:
        """Move bytes of a unit's `state` from the compute device to its tier."""
        lanes = self._way(state, unit, "nvme write", "copy out")[::-1]
        return self._move(lanes, f"{unit.name} {state}", num_bytes, after)

    def _way(self, state: str, unit: UnitLoad, drive: str, copy: str) -> list[str]:
        tier = self.step.cache_tier if state in unit.cached else self.step.placement[state]
        lanes = [drive] if tier == "nvme" else []
        return lanes + ([copy] if self.step.accelerator and tier != "device" else [])

    def _move(self, lanes: Sequence[str], name: str, num_bytes: float, after: Sequence[int]) -> list[int]:
        last = list(after)
        for lane in lanes if num_bytes else ():
            last = [self.add(lane, name, num_bytes, last)]
        return last

    def handle(self, name: str, num_bytes: float, after: Sequence[int]) -> int:
        """Work of the compute device that moves `num_bytes` to and from its memory, and does little else."""
        return self.add("compute", name, num_bytes / ADAMW_BYTES, after, "adamw")

    def between_ranks(self, name: str, num_bytes: float, after: Sequence[int]) -> list[int]:
        """All-gather or reduce-scatter `num_bytes` in all."""
        others = (self.step.world_size - 1) / self.step.world_size
        return [self.add("network", name, num_bytes * others, after)] if others else list(after)


def sweep_steps(step: Step, count: int = 3) -> tuple[list[Op], list[int]]:
    """`count` steps of zinf, each with the update of the step before.

    Returns their operations, and the place of each step's last compute among them.
    """
    sweeps = _Sweeps(step)
    return sweeps.ops.ops, [sweeps.step_of() for _ in range(count)]


class _Sweeps:
    """Writes the list: visits, fetches that run ahead of them, and updates on the way."""

    def __init__(self, step: Step) -> None:
        self.step, self.ops = step, Ops(step)
        number = len(step.units)
        self._released: list[int] = []
        self._pieces: list[int] = []
        self._params: list[list[int]] = [[] for _ in range(number)]
        """By unit: the writes that the next read of its parameters waits for."""
        self._grads: list[list[int]] = [[] for _ in range(number)]
        self._kept: list[list[int]] = [[] for _ in range(number)]

    def step_of(self) -> int:
        step, last = self.step, len(self.step.units) - 1
        left, first = step.micro_batches, True
        while left > 0:
            batches = min(step.per_sweep, left)
            left -= batches
            for number in range(last):
                self._visit(number, batches, "forward", update=first)
            self._visit(last, batches, "turn", update=first, first=first, final=left == 0)
            for number in (n for n in reversed(range(last)) if step.units[n].learns):
                self._visit(number, batches, "backward", first=first, final=left == 0)
            first = False
        return self._released[-1]

    def _visit(
        self, number: int, batches: int, kind: str, *, update: bool = False, first: bool = True, final: bool = False
    ) -> None:
        step, ops, unit = self.step, self.ops, self.step.units[number]
        room = self._released[-step.depth : len(self._released) - step.depth + 1] if step.depth else []
        updated = update and self._update_of(unit) in ("deferred", "in vain")
        share = 1.0 if updated else unit.share  # an update reads what it changes, visit or not
        ready = self._bring_params(unit, share, [*room, *self._params[number]])
        if updated:
            ready = self._update(number, [*room, *self._grads[number]], ready, with_grad=True)
        ready = ops.between_ranks(f"gather {unit.name}", self._moved_bytes(unit) * unit.share, ready)
        if unit.unpacked:
            ready = [ops.handle(f"{unit.name} unpack", unit.unpacked * unit.share * UNPACKED_BYTES, ready)]
        if kind == "backward":
            back = unit.kept_bytes if unit.back_bytes is None else unit.back_bytes
            ready += ops.bring("activations", unit, back * batches, [*room, *self._kept[number]])
        if kind != "forward" and unit.trainable:
            ready = [ops.handle(f"{unit.name} clear gradient", unit.trainable * unit.share * GRAD.item_bytes, ready)]
        glue = unit.glue_bytes * batches * GLUE[step.accelerator]
        if kind != "backward" and glue:
            ready = [ops.handle(f"before {unit.name}", glue, ready)]
        backward = unit.passes - 1 + unit.recomputed
        passes = {"forward": 1, "turn": unit.passes + unit.again, "backward": backward + unit.again}[kind]
        pieces = min(batches, PIECES)
        for _ in range(pieces):
            flops = unit.flops * passes * batches / pieces
            ready = [ops.add("compute", f"{unit.name} {kind}", flops, ready, "matmul")]
        if kind != "forward" and glue:
            ready = [ops.handle(f"before {unit.name}, backward", glue, ready)]
        self._released.append(ready[0])
        if kind == "forward":
            self._kept[number] = ops.send("activations", unit, unit.kept_bytes * batches, ready)
        elif unit.trainable:
            self._gradient(number, ready, room, first=first, final=final)

    def _bring_params(self, unit: UnitLoad, share: float, after: list[int]) -> list[int]:
        """Bring this rank's slice of the parameters; of an adapter (fp32) from the tier where its moments lie."""
        step, ops = self.step, self.ops
        own = 1 / step.world_size * share
        if not step.optimizer.adapts:
            return ops.bring("params", unit, unit.params * own * step.param_bytes, after)
        frozen = self._moved_bytes(unit) - unit.trainable * step.param_bytes
        ready = ops.bring("params", unit, frozen * own, after)
        return ops.bring(step.optimizer.param_class, unit, unit.trainable * own * FP32_BYTES, ready)

    def _moved_bytes(self, unit: UnitLoad) -> float:
        """Bytes of its parameters as they travel."""
        if unit.frozen_bytes is None:
            return unit.params * self.step.param_bytes
        return unit.frozen_bytes + unit.trainable * self.step.param_bytes

    def _gradient(self, number: int, after: list[int], room: list[int], *, first: bool, final: bool) -> None:
        step, ops, unit = self.step, self.ops, self.step.units[number]
        own = unit.trainable * unit.share / step.world_size * GRAD.item_bytes
        moved = own * step.grad_bytes / GRAD.item_bytes
        reduced = ops.between_ranks(f"reduce {unit.name}", unit.trainable * unit.share * GRAD.item_bytes, after)
        if not first:
            earlier = ops.bring("grads", unit, moved, [*room, *self._grads[number]])
            if earlier or step.world_size > 1:  # otherwise compute has added to the gradient in place
                reduced = [ops.handle(f"{unit.name} add gradient", 3 * own, [*reduced, *earlier])]
        if final:
            reduced = [ops.handle(f"{unit.name} norm", own, reduced)]
        if final and self._update_of(unit) != "deferred":
            self._update(number, reduced, reduced, with_grad=False)
        if not final or self._update_of(unit) != "eager":
            self._grads[number] = ops.send("grads", unit, moved, reduced)

    def _update_of(self, unit: UnitLoad) -> str:
        return "deferred" if self.step.update in ("speculative", "in vain") and unit.cached else self.step.update

    def _update(self, number: int, after: Sequence[int], ready: list[int], *, with_grad: bool) -> list[int]:
        """Update this rank's slice, piece by piece. Returns what the next use of the slot waits for."""
        step, ops, unit = self.step, self.ops, self.step.units[number]
        own = unit.trainable / step.world_size
        if not own:
            return ready
        pieces = max(1, min(PIECES, round(own / step.chunk_params * PIECES)))
        piece = own / pieces
        ahead = max(1, round(step.chunk_params / piece))
        states = step.optimizer.bytes_per_param(step.dtype)
        if unit.moment_bytes is not None:
            states = unit.moment_bytes / unit.trainable
        cost = step.optimizer.moved_bytes_per_param / ADAMW_BYTES
        writes: list[int] = []
        for _ in range(pieces):
            buffers = self._pieces[-ahead : len(self._pieces) - ahead + 1]
            reads = ops.bring("optimizer", unit, piece * states, [*after, *buffers])
            if with_grad:
                reads = reads + ops.bring("grads", unit, piece * unit.share * step.grad_bytes, [*after, *buffers])
            done = [ops.add("compute", f"{unit.name} update", piece * cost, [*reads, *ready], "adamw")]
            if unit.update_flops:
                flops = unit.update_flops / step.world_size / pieces
                done = [ops.add("compute", f"{unit.name} update, whole", flops, done, "matmul")]
            self._pieces += ops.send("optimizer", unit, piece * states, done)
            writes += ops.send(step.optimizer.param_class, unit, piece * step.param_bytes, done)
            ready = done
        self._params[number] = writes
        return ready
