"""Updates in the backward pass: a unit is updated as soon as its gradient is complete.

It needs no second read of the parameters and, where nothing has to wait for the gradient norm, no trip of the gradient
to its tier; and the drive is as busy in backward as in forward.

**Speculation.** Where the norm may clip the gradient but lately did not, the update is made as if it would not again,
into the unit's other home (ping-pong), and the gradient is kept on its tier too. When the norm is known, either the
unit moves there, or the deferred update is made from where it was as if nothing had happened. Either way the bits are
those of an update that waited: the coefficient is exactly 1 where the norm is not clipped. Units that have no second
home, because their state is in memory anyway, wait for the next forward as ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from zinf_cli.engine.traffic.buffers import Memory
from zinf_cli.engine.traffic.fetch import Fetch
from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.engine.units.store import Unit
from zinf_cli.tiers.tier import Transfer


class EagerUpdates:
    """Updates under way, oldest first, with the slots and gradients they use."""

    def __init__(self, units: Sequence[Unit], memory: Memory, wait: Callable[[Transfer], None]) -> None:
        self.active = False
        """Whether this step's updates are made in its backward pass."""
        self.speculative = False
        """Whether they have to be confirmed: see `commit` and `discard`."""
        self.kernel: Kernel | None = None
        """The settings they go by."""
        self._units = units
        self._memory = memory
        self._wait = wait
        self._under_way: deque[tuple[Fetch, list[Transfer]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def takes(self, unit: Unit) -> bool:
        """Whether this step's update of `unit` is one of them."""
        return self.active and (not self.speculative or unit.has_second_home)

    def start(self, fetch: Fetch, own: Sequence[torch.Tensor]) -> None:
        """Update the unit of `fetch` with its gradient slices `own` (fp32), which lie in its buffer or home."""
        assert self.kernel is not None
        writes: list[Transfer] = []
        if self.speculative:
            writes = fetch.unit.write_grads(own)
        fetch.update_now(own, self.kernel, speculative=self.speculative)
        self._under_way.append((fetch, writes))

    def advance(self) -> None:
        """Move what can move without waiting."""
        while self._under_way and self._under_way[0][0].progress():
            self._let_go()
        for fetch, _ in self._under_way:
            if not fetch.issue():
                break

    def wait_for_chunk(self) -> None:
        """Wait for the next chunk of the oldest update."""
        fetch, _ = self._under_way[0]
        if fetch.progress(self._wait):
            self._let_go()
        elif fetch.starved:
            self._memory.drain_one(self._wait)

    def finish(self) -> None:
        while self._under_way:
            self.wait_for_chunk()

    def commit(self) -> None:
        """The updates of this step hold; those under way will be finished in their time."""
        for unit in self._undecided():
            unit.life.commit()

    def discard(self) -> None:
        """They do not hold: each unit gets its deferred update instead."""
        self.finish()
        for unit in self._undecided():
            unit.life.discard()

    def _undecided(self) -> list[Unit]:
        """Each unit with an update that is yet to be confirmed."""
        return [unit for unit in self._units if unit.life.undecided]

    def _let_go(self) -> None:
        fetch, writes = self._under_way.popleft()
        fetch.let_go_of_slot()
        fetch.let_go_of_grad(writes)
