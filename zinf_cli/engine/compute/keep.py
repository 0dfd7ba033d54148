"""Packs what autograd saves for backward, so that it takes no memory of the compute device until then.

A unit whose activations are kept runs its forward once, with grad. While it runs, autograd hands over every tensor it
saves (torch.autograd.graph.saved_tensors_hooks). A weight is packed as a window into its parameter: the backward visit
binds the parameter again, though probably at another address. Every other tensor is an activation. It stays in memory,
or goes to its tier when the forward is over. Each storage goes once, and those of a call go together in a few large
transfers. An activation comes back with the strides it had.

What a micro-batch's glue saves between two units is packed likewise. It is sent while the micro-batch waits at the
second unit. Later glue may save the same storage again, so a GlueKeeper knows what it has sent. Backward of that glue
brings back that storage alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from weakref import ReferenceType, ref

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from zinf_cli.engine.compute.activations import PARCEL, Activations, Kept, Offloaded, Parcel, Part

_Unpack = Callable[[], torch.Tensor]


class Keeper:
    """Packs what one call of a unit saves.

    `params` are the unit's parameters, bound now and in its backward. `present` are tensors that stay in memory until
    then.
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
        """What was saved since the last `send`, by storage."""

    def add_present(self, tensors: Iterable[torch.Tensor]) -> None:
        """More tensors that stay in memory until backward."""
        self._present.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def packing(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which this keeper packs what autograd saves. It is for the thread that computes."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def send(self) -> list[Parcel]:
        """Send what was saved since the last call. Returns the parcels."""
        sent: list[Parcel] = []
        together: list[_Storage] = []
        num_bytes = 0
        for storage in self._leaving.values():
            if together and num_bytes + storage.num_bytes > PARCEL:
                sent.append(self._send(together))
                together, num_bytes = [], 0
            together.append(storage)
            num_bytes += storage.num_bytes
        if together:
            sent.append(self._send(together))
        self._leaving.clear()
        return sent

    def _pack(self, tensor: torch.Tensor) -> _Unpack:
        for begin, end, param in self._params:
            if begin <= tensor.data_ptr() < end:
                offset = (tensor.data_ptr() - begin) // tensor.element_size()
                return _Window(partial(getattr, param, "data"), tensor, offset)
        storage = tensor.untyped_storage()
        if storage._cdata in self._present or self._activations.keeps(storage.nbytes()):
            return Kept(tensor).get
        return _Window(self._kept(tensor, storage).get, tensor, int(tensor.storage_offset()))

    def _kept(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> _Storage:
        kept = self._leaving.get(storage._cdata)
        if kept is None or not kept.is_as_saved(tensor):
            kept = self._leaving[storage._cdata] = _Storage(tensor)
        return kept

    def _send(self, storages: Sequence[_Storage]) -> Parcel:
        parts = self._activations.save_together([storage.get() for storage in storages], self._label)
        for storage, part in zip(storages, parts, strict=True):
            storage.move_to(part)
        return parts[0].parcel


class GlueKeeper(Keeper):
    """Packs what the glue of one micro-batch saves. It is sent at every unit."""

    def __init__(self, activations: Activations, present: Iterable[torch.Tensor]) -> None:
        super().__init__(activations, (), present, "glue")
        self._known: dict[int, tuple[StorageWeakRef, ReferenceType[_Storage]]] = {}
        """What was sent or kept, by storage, as long as that lives: if it is saved again, it is not sent again."""
        self._again: dict[int, Part] = {}
        """What was sent before, and was saved again since the last `take_again`; by `id` of its _Storage."""

    def send(self) -> list[Parcel]:
        self._know()
        return super().send()

    def keep(self) -> None:
        """Leave in memory what was saved since the last call: backward has it from there."""
        self._know()
        self._leaving.clear()

    def _know(self) -> None:
        self._known = {key: (alive, kept) for key, (alive, kept) in self._known.items() if not alive.expired()}
        self._known |= {key: (kept.alive(), ref(kept)) for key, kept in self._leaving.items()}

    def take_again(self) -> list[Part]:
        """What was sent before, and was saved again since the last call."""
        again, self._again = list(self._again.values()), {}
        return again

    def _kept(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> _Storage:
        alive, known = self._known.get(storage._cdata, (None, None))
        before = known() if alive is not None and known is not None and not alive.expired() else None
        if before is None or not before.is_as_saved(tensor):
            return super()._kept(tensor, storage)
        if before.home is not None and id(before) not in self._again:
            self._again[id(before)] = before.home.alone()
        return before


class _Storage:
    """The bytes behind saved tensors. They stay in memory until the forward is over, so no address is used twice."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.num_bytes = tensor.untyped_storage().nbytes()
        self._version = tensor._version
        self._tensor: Kept | None = Kept(tensor)
        self.home: Offloaded | None = None

    def is_as_saved(self, tensor: torch.Tensor) -> bool:
        """Whether the storage, which is that of `tensor`, is unchanged since it was saved."""
        return tensor._version == self._version

    def get(self) -> torch.Tensor:
        """All of the bytes, as uint8."""
        if self.home is not None:
            return self.home.peek()
        assert self._tensor is not None
        tensor = self._tensor.get()
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())

    def alive(self) -> StorageWeakRef:
        """Tells whether anybody still holds the storage. Before `move_to`, this object does."""
        assert self._tensor is not None
        return StorageWeakRef(self._tensor.get().untyped_storage())

    def move_to(self, home: Offloaded) -> None:
        """The bytes are on their way to their tier: memory for them may be freed."""
        self._tensor, self.home = None, home


class _Window:
    """A tensor as a window into `source()`: it begins `offset` elements after the first byte of that."""

    def __init__(self, source: Callable[[], torch.Tensor], tensor: torch.Tensor, offset: int) -> None:
        self._source = source
        self._dtype = tensor.dtype
        self._size, self._stride, self._offset = tensor.size(), tensor.stride(), offset

    def __call__(self) -> torch.Tensor:
        base = self._source().view(self._dtype)
        return base.as_strided(self._size, self._stride, base.storage_offset() + self._offset)


def _unpack(packed: _Unpack) -> torch.Tensor:
    return packed()
