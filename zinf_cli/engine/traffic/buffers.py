"""The buffers that a step works in. A buffer whose bytes are on their way is freed when the transfer is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from zinf_cli.tiers.arena import Arena, Buffer
from zinf_cli.tiers.streams import Event, now
from zinf_cli.tiers.tier import Transfer


@dataclass
class Memory:
    """The buffers a pipeline works in, all on the compute device."""

    slots: Arena
    """Parameters and gradients of held and coming units."""
    resident: Arena
    """The resident unit, for the whole step."""
    chunks: Arena
    """Buffers of one size, for the update."""
    chunk_numel: int
    _draining: deque[tuple[deque[Transfer], list[Buffer], Event]] = field(default_factory=deque, init=False, repr=False)

    @property
    def draining(self) -> bool:
        """Whether some buffers wait for transfers to be freed."""
        return bool(self._draining)

    def holds_weights(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies where parameters of held units lie."""
        return self.slots.holds(tensor) or self.resident.holds(tensor)

    def free_after(self, transfers: Sequence[Transfer], buffers: Sequence[Buffer]) -> None:
        """Free `buffers` when `transfers` are done. Those of streams have events, by which the next user of the memory
        waits, and not the CPU."""
        events = [transfer.event for transfer in transfers if transfer.event is not None]
        if len(events) < len(transfers):
            self._draining.append((deque(transfers), list(buffers), now(self.slots.device)))
        else:
            _free(buffers, events)

    def reclaim(self) -> None:
        """Free the buffers whose transfers are done. Raises TierError where one of these failed."""
        for _ in range(len(self._draining)):
            transfers, buffers, used = self._draining.popleft()
            while transfers and transfers[0].done():  # asked once: many may be under way
                transfers.popleft().wait()
            if transfers:
                self._draining.append((transfers, buffers, used))
            else:
                _free(buffers, [used])

    def drain_one(self, wait: Callable[[Transfer], object]) -> None:
        """Wait for the oldest transfers, and free their buffers. There has to be one: see `draining`."""
        transfers, buffers, used = self._draining.popleft()
        for transfer in transfers:
            wait(transfer)
        _free(buffers, [used])


def _free(buffers: Sequence[Buffer], after: Sequence[Event]) -> None:
    for buffer in buffers:
        buffer.free(after)
