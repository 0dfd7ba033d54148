"""What a unit's graph saves for backward, packed so that the graph can outlive the visit that made it.

A unit whose activations are kept runs its forward once, with grad. While it runs, autograd hands over every tensor it
saves (torch.autograd.graph.saved_tensors_hooks). A weight is packed as a window into its parameter, whose bytes are
back in the backward visit, probably elsewhere. All else is an activation: it stays, or goes to its tier, where tensors
that share a storage make one transfer, and comes back with the strides it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from zinf_cli.engine.activations import Activations, Kept, Saved

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
        self._storages: dict[int, tuple[Saved, torch.UntypedStorage]] = {}
        self.saved: list[Saved] = []

    def add_present(self, tensors: Iterable[torch.Tensor]) -> None:
        self._present.update(tensor.untyped_storage()._cdata for tensor in tensors)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """The time of the unit's forward."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield
        self._storages.clear()  # held until here, so that no address was used twice

    def _pack(self, tensor: torch.Tensor) -> _Unpack:
        for begin, end, param in self._params:
            if begin <= tensor.data_ptr() < end:
                offset = (tensor.data_ptr() - begin) // tensor.element_size()
                return _Window(partial(getattr, param, "data"), tensor, offset)
        storage = tensor.untyped_storage()
        if storage._cdata in self._present or self._activations.keeps(storage.nbytes()):
            return Kept(tensor).get
        return _Window(self._save(storage, tensor.device).get, tensor, int(tensor.storage_offset()))

    def _save(self, storage: torch.UntypedStorage, device: torch.device) -> Saved:
        if storage._cdata not in self._storages:
            whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
            saved = self._activations.save(whole, self._label)
            self._storages[storage._cdata] = (saved, storage)
            self.saved.append(saved)
        return self._storages[storage._cdata][0]


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
