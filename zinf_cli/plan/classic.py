"""ZeRO-Infinity's own schedule, to compare with: one micro-batch after the other, then the update.

Parameters and gradients are fp16. The next step waits for the whole update. It streams fp32 gradient, momentum,
variance and parameter past the CPU; where the optimizer states lie on the device, it runs there.
"""

from __future__ import annotations

from zinf_cli.plan.schedule import Op, Ops, Step

FP16 = 2
READ, WRITTEN = 16, 12
"""Bytes per parameter of the fp32 states that an update reads and writes. It does not write the gradient."""


def classic_steps(step: Step, count: int = 2) -> tuple[list[Op], list[int]]:
    """The operations of `count` steps, and the place of each step's last operation among them."""
    classic = _Classic(step)
    return classic.ops.ops, [classic.step_of() for _ in range(count)]


class _Classic:
    def __init__(self, step: Step) -> None:
        self.step, self.ops = step, Ops(step)
        self._computed: list[int] = []
        self._begun: list[int] = []
        """The last update's end, which the next step waits for."""
        self._kept: list[list[int]] = []
        self._leaving: list[int] = []

    def step_of(self) -> int:
        units = range(len(self.step.units))
        for micro_batch in range(self.step.micro_batches):
            last = micro_batch == self.step.micro_batches - 1
            self._kept = [[] for _ in units]
            for number in units:
                self._forward(number)
            for number in reversed(units):
                self._backward(number, last=last)
        self._begun = self._update([*self._leaving, *self._computed[-1:]])
        self._leaving = []
        return self._begun[-1]

    def _forward(self, number: int) -> None:
        unit = self.step.units[number]
        done = self._visit(number, "forward", 1, [])
        self._kept[number] = self.ops.send("activations", unit, unit.kept_bytes, done)

    def _backward(self, number: int, *, last: bool) -> None:
        """Recompute and backward. The gradient goes to its tier; the last micro-batch's goes, in fp32, to where the
        update reads it."""
        step, ops, unit = self.step, self.ops, self.step.units[number]
        brought = ops.bring("activations", unit, unit.kept_bytes, [*self._room(), *self._kept[number]])
        done = self._visit(number, "backward", 3, brought)
        reduced = ops.between_ranks(f"reduce {unit.name}", unit.trainable * FP16, done)
        own = unit.trainable / step.world_size * FP16
        self._leaving += ops.send("optimizer" if last else "grads", unit, own * (2 if last else 1), reduced)

    def _room(self) -> list[int]:
        """What a fetch waits for: a free buffer, and the update of the step before."""
        return [*self._computed[-self.step.depth :][:1], *self._begun]

    def _visit(self, number: int, kind: str, passes: int, also: list[int]) -> list[int]:
        """Fetch, gather, compute, and the all-reduces of model parallelism: two in forward, four in backward."""
        step, ops, unit = self.step, self.ops, self.step.units[number]
        ready = ops.bring("params", unit, unit.params / step.world_size * FP16, self._room())
        ready = [*ops.between_ranks(f"gather {unit.name}", unit.params * FP16, ready), *also, *self._computed[-1:]]
        done = [ops.add("compute", f"{unit.name} {kind}", unit.flops * passes, ready, "matmul")]
        if step.exchange_bytes:
            exchanged = step.exchange_bytes * (1 if passes == 1 else 2)
            done = [ops.add("network", f"{unit.name} all-reduce", exchanged, done, "inside")]
        self._computed.append(done[0])
        return done

    def _update(self, after: list[int]) -> list[int]:
        """Update one unit's slice after the other. Returns the last operations."""
        step, ops = self.step, self.ops
        last: list[int] = []
        on_cpu = step.accelerator and step.placement["optimizer"] != "device"
        streamed = step.placement["optimizer"] == "nvme"
        lane, rate = ("update", "cpu adamw") if on_cpu else ("compute", "adamw")
        for unit in step.units:
            own = unit.trainable / step.world_size
            ready = [ops.add("nvme read", f"{unit.name} optimizer", own * READ, after)] if streamed else after
            done = [ops.add(lane, f"{unit.name} update", own, ready, rate)]
            if streamed:
                last.append(ops.add("nvme write", f"{unit.name} optimizer", own * WRITTEN, done))
            if step.placement["params"] == "nvme":
                last.append(ops.add("nvme write", f"{unit.name} params", own * FP16, done))
            last += done
        return last
