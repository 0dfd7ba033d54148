"""Updates in the backward pass: a unit is updated as soon as its gradient is complete.

The update uses the parameters that the backward has in its slot, so they are not read again. Where nothing waits for
the gradient norm, the gradient never goes to its tier. Drives and links are as busy in backward as in forward.

On an accelerator these updates have a stream of their own. Its copies wait for buffers, its kernels for copies, and
compute for neither. So the CPU queues all of an update as soon as the gradient's last kernel is queued, and the
optimizer's fields are read before that kernel runs.

**Speculation.** The norm may clip the gradient, but has not done so lately. Then the update assumes that it will not.
It writes into the unit's shadow, and the gradient goes to its tier too. When the norm is known and clips nothing, the
update is committed: the unit lies in the shadow, and its old home is the next shadow. If the norm clips, the update is
rolled back: the unit lies where it lay, and gets a deferred update. The bits are those of a deferred update either way,
since a gradient that is not clipped is multiplied by exactly 1. Units without a shadow get deferred updates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from zinf_cli.engine.traffic.buffers import Memory
from zinf_cli.engine.traffic.fetch import Fetch
from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.engine.units.store import Unit
from zinf_cli.tiers.streams import streams_of
from zinf_cli.tiers.tier import Transfer, Wait, wait_if_done, wait_if_queued


class EagerUpdates:
    """Updates under way, oldest first, with the slots and gradients they use."""

    def __init__(self, units: Sequence[Unit], memory: Memory, wait: Wait) -> None:
        self.active = False
        """Whether this step's updates are made in its backward pass."""
        self.speculative = False
        """Whether they may be rolled back: each waits for `commit` or `roll_back`."""
        self.kernel: Kernel | None = None
        """The settings of these updates."""
        self.made: list[Unit] = []
        """The units whose update of this step is one of them."""
        self._units = units
        self._memory = memory
        self._wait = wait
        self._device = memory.slots.device
        self._streams = streams_of(self._device)
        self._stream = self._streams.new(self._device)
        self._under_way: deque[tuple[Fetch, list[Transfer]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def takes(self, unit: Unit) -> bool:
        """Whether this step's update of `unit` is one of them."""
        return self.active and (not self.speculative or unit.has_shadow)

    def start(self, fetch: Fetch, own: Sequence[torch.Tensor]) -> None:
        """Update the unit of `fetch`. `own` are this rank's slices of its gradient (fp32, 1-D), in memory."""
        assert self.kernel is not None
        self._stream.wait_stream(self._streams.current(self._device))
        with self._beside_compute(fetch):
            writes: list[Transfer] = []
            if self.speculative:
                writes = fetch.unit.write_grads(own)
            fetch.update_now(own, self.kernel, speculative=self.speculative)
        self._under_way.append((fetch, writes))
        self.made.append(fetch.unit)

    def advance(self) -> None:
        """Move what can move without waiting."""
        while self._under_way and self._progress():
            pass
        for fetch, _ in self._under_way:
            with self._beside_compute(fetch):
                if not fetch.issue():
                    break

    def wait_for_chunk(self) -> None:
        """Wait for the next chunk of the oldest update."""
        fetch, _ = self._under_way[0]
        if not self._progress(self._wait) and fetch.starved:
            self._memory.drain_one(self._wait)

    def _progress(self, wait: Wait | None = None) -> bool:
        """Go on with the oldest update. True when it is made, and its memory is given back."""
        fetch, writes = self._under_way[0]
        with self._beside_compute(fetch):
            if not fetch.progress(wait or (wait_if_done if fetch.unit.changes_in_place else wait_if_queued)):
                return False
            fetch.free_slot()
            fetch.free_grad(writes)
        self._under_way.popleft()
        return True

    def _beside_compute(self, fetch: Fetch) -> AbstractContextManager[None]:
        """A context whose stream works beside compute. What lies in memory of the device is changed in order."""
        return nullcontext() if fetch.unit.changes_in_place else self._streams.use(self._stream)

    def finish(self) -> None:
        """Wait until all updates under way are made."""
        while self._under_way:
            self.wait_for_chunk()

    def commit(self) -> None:
        """The updates of this step hold. Those under way go on."""
        for unit in self._undecided():
            unit.life.commit()

    def roll_back(self) -> None:
        """The updates of this step do not hold: each unit gets a deferred update instead."""
        self.finish()
        for unit in self._undecided():
            unit.life.roll_back()

    def _undecided(self) -> list[Unit]:
        """The units with a speculative update of this step."""
        return [unit for unit in self._units if unit.life.undecided]
