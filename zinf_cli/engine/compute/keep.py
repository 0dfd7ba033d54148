"""What a unit's graph saves for backward, packed so that the graph can outlive the visit that made it.

A unit whose activations are kept runs its forward once, with grad. While it runs, autograd hands over every tensor it
saves (torch.autograd.graph.saved_tensors_hooks). A weight is packed as a window into its parameter, whose bytes are
back in the backward visit, probably elsewhere. All else is an activation: it stays, or goes to its tier when the
forward is over, each storage once and all of a call in a few large transfers, and comes back with the strides it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from zinf_cli.engine.compute.activations import PARCEL, Activations, Kept, Offloaded, Saved

_Unpack = Callable[[], torch.Tensor]


class Keeper:
    """Packs what one call of a unit saves; `saved` is what has to be brought back for its backward.

    `params` are the unit's, bound now and in its backward; `present` are tensors that stay where they are until then.
    """

    def __init__(
        self, activations: Activations, params: Sequence[nn.Parameter], present: Iterable[torch.Tensor], label: str
    ) -> None:
        self._activations = activations
        self._label = label
        self._params = [(p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), p) for p in params]
        self._present: set[int] = set()
        self.add_present(present)
        self._leaving: dict[int, _Storage] = {}
        self.saved: list[Saved] = []

    def add_present(self, tensors: Iterable[torch.Tensor]) -> None:
        self._present.update(tensor.untyped_storage()._cdata for tensor in tensors)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """The time of the unit's forward."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield
        together: list[_Storage] = []
        num_bytes = 0
        for storage in self._leaving.values():
            if together and num_bytes + storage.num_bytes > PARCEL:
                self._send(together)
                together, num_bytes = [], 0
            together.append(storage)
            num_bytes += storage.num_bytes
        if together:
            self._send(together)
        self._leaving.clear()

    def _pack(self, tensor: torch.Tensor) -> _Unpack:
        for begin, end, param in self._params:
            if begin <= tensor.data_ptr() < end:
                offset = (tensor.data_ptr() - begin) // tensor.element_size()
                return _Window(partial(getattr, param, "data"), tensor, offset)
        storage = tensor.untyped_storage()
        if storage._cdata in self._present or self._activations.keeps(storage.nbytes()):
            return Kept(tensor).get
        if storage._cdata not in self._leaving:
            self._leaving[storage._cdata] = _Storage(tensor)
        return _Window(self._leaving[storage._cdata].get, tensor, int(tensor.storage_offset()))

    def _send(self, storages: Sequence[_Storage]) -> None:
        parts = self._activations.save_together([storage.get() for storage in storages], self._label)
        for storage, part in zip(storages, parts, strict=True):
            storage.move_to(part)
        self.saved.append(parts[0].parcel)


class _Storage:
    """The bytes behind saved tensors: in memory until the forward is over, so that no address is used twice."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.num_bytes = tensor.untyped_storage().nbytes()
        self._tensor: Kept | None = Kept(tensor)
        self._home: Offloaded | None = None

    def get(self) -> torch.Tensor:
        """All of them, as uint8."""
        if self._home is not None:
            return self._home.get()
        assert self._tensor is not None
        tensor = self._tensor.get()
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())

    def move_to(self, home: Offloaded) -> None:
        self._tensor, self._home = None, home


class _Window:
    """A tensor as a window into `source()`, whose first byte is element -`offset` of it."""

    def __init__(self, source: Callable[[], torch.Tensor], tensor: torch.Tensor, offset: int) -> None:
        self._source = source
        self._dtype = tensor.dtype
        self._size, self._stride, self._offset = tensor.size(), tensor.stride(), offset

    def __call__(self) -> torch.Tensor:
        base = self._source().view(self._dtype)
        return base.as_strided(self._size, self._stride, base.storage_offset() + self._offset)


def _unpack(packed: _Unpack) -> torch.Tensor:
    return packed()
