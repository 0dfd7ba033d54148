"""Operations that take virtual time instead of being computed: torch's dispatch, with a price for each kernel.

Small tensors are computed, since code asks for their values. A large operation computes nothing: its results are views
of one region of zeros that is never written, as are the arenas behind it. So a model of any size is played in little
memory. Which tensors lie on the device is known from their memory; the others are the host's own.
"""

from __future__ import annotations

import mmap
from bisect import bisect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from benchmarks.lanes import IN, KERNELS, OUT, Lanes

SMALL = 1 << 14
"""Elements of the largest tensor that is computed."""
aten = torch.ops.aten
_FREE = {
    aten._unsafe_view.default, aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default,
    aten.empty_strided.default, aten.new_empty_strided.default, aten.set_.source_Storage,
    aten.set_.source_Storage_storage_offset,
}  # fmt: skip
"""No kernel."""
_ANSWERS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default}
"""The host waits for the result."""
_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: 1.0,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 2.5,
}
"""The forward's FLOPs, times this; a causal one computes half."""


@contextmanager
def products_added_up() -> Iterator[None]:
    """A context in which the CPU adds 16-bit products to fp32, as accelerators do: torch has no such kernel for it."""

    def add_product(into: torch.Tensor, first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype,
                    *, beta: float = 1, alpha: float = 1, out: torch.Tensor) -> torch.Tensor:  # fmt: skip
        return torch.addmm(into, first.to(dtype), second.to(dtype), beta=beta, alpha=alpha, out=out)

    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", add_product, "CPU")
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def norms_in_one_kernel() -> Iterator[None]:
    """A context in which the CPU has fused RMSNorms, as accelerators do: torch's are made of other operations."""

    def forward(
        x: torch.Tensor, shape: list[int], weight: torch.Tensor | None, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rstd = (x.float().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        normed = x.float() * rstd
        return (normed if weight is None else normed * weight).to(x.dtype), rstd

    def backward(
        grad: torch.Tensor, x: torch.Tensor, shape: list[int], rstd: torch.Tensor, weight: torch.Tensor | None,
        mask: list[bool],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        normed = x.float() * rstd
        of_normed = grad.float() if weight is None else grad * weight.float()
        along = (of_normed * normed).mean(-1, keepdim=True)
        of_weight = None if weight is None else (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        return ((of_normed - normed * along) * rstd).to(x.dtype), of_weight

    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_rms_norm", forward, "CPU")
    library.impl("_fused_rms_norm_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


class Priced(TorchDispatchMode):
    """Prices what runs within. Every thread enters a mode of its own on the same lanes."""

    def __init__(self, lanes: Lanes, memory: Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lanes = lanes
        self._memory = memory
        self._known: dict[Any, tuple[Any, float]] = {}
        """What large operations return (on the meta device), and their seconds: by operation and arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        on_device = any(map(self._memory.on_device, given)) or (not given and kwargs.get("device") == DEVICE)
        moved = func is aten._to_copy.default and kwargs.get("device") == DEVICE and not on_device
        if func.is_view or func in _FREE or any(tensor.is_meta for tensor in given):
            return self._noted(func(*args, **kwargs), on_device)
        if moved:
            self._copy_pageable(given[0])
            return self._noted(func(*args, **kwargs), True)
        if func is aten.copy_.default and self._memory.is_host(given[0]) != self._memory.is_host(given[1]):
            return self._copy(*given[:2], blocking=not (args[2:] and args[2]))
        if not on_device:
            return func(*args, **kwargs)
        results, seconds = self._run(func, args, kwargs, given)
        self._lanes.launch(func.overloadpacket.__name__, KERNELS, seconds)
        if func in _ANSWERS:
            self._lanes.current(DEVICE).synchronize()
        return results

    def _noted(self, results: Any, on_device: bool) -> Any:
        if on_device:
            for result in _tensors(results):
                self._memory.note(result)
        return results

    def _run(self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor]) -> tuple[Any, float]:
        """What the operation returns, and its seconds."""
        changed = func._schema.arguments[0].alias_info
        into = kwargs.get("out", args[0] if given and changed is not None and changed.is_write else None)
        in_place = into is not None
        if all(tensor.numel() <= SMALL for tensor in given):
            results = func(*args, **kwargs)
            if in_place or all(tensor.numel() <= SMALL for tensor in _tensors(results)):
                written = () if in_place else _tensors(results)
                return self._noted(results, True), self._seconds(func, args, given, written)
        key = func, _key(args), _key(tuple(kwargs.items()))
        if key not in self._known:
            like = None if in_place else _on_meta(func, args, kwargs)
            self._known[key] = like, self._seconds(func, args, given, _tensors(like))
        like, seconds = self._known[key]
        if in_place:
            return (into if func._schema.returns else None), seconds
        return tree_map_only(torch.Tensor, self._memory.zeros, like), seconds

    def _seconds(self, func: Any, args: Any, given: list[torch.Tensor], results: Iterable[torch.Tensor]) -> float:
        """The time of the kernel's FLOPs, or that of its bytes if that is longer."""
        rates, out = self._lanes.rates, list(results)
        arguments = zip(args, func._schema.arguments, strict=False)
        written = [leaf for arg, said in arguments if said.alias_info is not None and said.alias_info.is_write
                   for leaf in _tensors(arg)]  # fmt: skip
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*given, *out, *written))
        if func in (aten.zero_.default, aten.fill_.Scalar, aten.copy_.default):
            num_bytes -= given[0].numel() * given[0].element_size()  # it is not read
        if func is aten.embedding.default:
            num_bytes = 2 * sum(tensor.numel() * tensor.element_size() for tensor in out)
        if func is aten.index_put_.default:  # rows are read, and added to others
            num_bytes = 3 * args[2].numel() * args[2].element_size()
        seconds = max(rates.kernel, num_bytes / rates.memory)
        if func in _ATTENTION:
            query, key = args[0:2] if func._schema.name.endswith("cpu") else args[1:3]
            batch, heads, length, width = query.shape
            flops = 4 * batch * heads * length * key.shape[2] * width * _ATTENTION[func] / 2
            return max(seconds, float(flops) / rates.attention)
        if func.overloadpacket in flop_registry:
            tensors = args[:3] if func is aten.addmm.dtype_out else args
            flops = flop_registry[func.overloadpacket](*tensors, out_val=next(iter(out), given[0]))
            return max(seconds, float(flops) / rates.matmul)
        return seconds

    def _copy(self, into: torch.Tensor, source: torch.Tensor, *, blocking: bool) -> torch.Tensor:
        """Between host and device."""
        lane = OUT if self._memory.is_host(into) else IN
        num_bytes = into.numel() * into.element_size()
        self._lanes.launch(lane, lane, num_bytes / self._lanes.rates.link)
        if blocking:
            self._lanes.current(DEVICE).synchronize()
        return into

    def _copy_pageable(self, source: torch.Tensor) -> None:
        """From the host's own memory: the host waits for the stream, and copies."""
        num_bytes = source.numel() * source.element_size()
        self._lanes.launch("pageable copy", IN, num_bytes / self._lanes.rates.pageable)
        self._lanes.current(DEVICE).synchronize()


DEVICE = torch.device("cpu", 0)
"""The compute device: it differs from `cpu`, so that CPU memory is another tier's."""


class _Ranges:
    """Ranges of addresses, none of which overlap."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, region: torch.Tensor) -> None:
        begin = region.data_ptr()
        place = bisect(self._begins, begin)
        self._begins.insert(place, begin)
        self._ends.insert(place, begin + region.numel())

    def __contains__(self, tensor: torch.Tensor) -> bool:
        address = tensor.data_ptr()
        place = bisect(self._begins, address)
        return place > 0 and address < self._ends[place - 1]


class Memory:
    """Which tensors lie on the device, and the memory of those that are never computed."""

    def __init__(self, capacity: int) -> None:
        self._map = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        self._device, self._host = _Ranges(), _Ranges()
        self._device.add(whole)
        self._small: dict[int, StorageWeakRef] = {}

    def add(self, region: torch.Tensor, *, device: bool) -> None:
        """A region (1-D uint8) that is the device's, or page-locked memory of the host."""
        (self._device if device else self._host).add(region)

    def is_host(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in page-locked memory of the host."""
        return tensor in self._host

    def on_device(self, tensor: torch.Tensor) -> bool:
        if tensor.is_meta:
            return False
        if tensor in self._device:
            return True
        small = self._small.get(tensor.untyped_storage()._cdata)
        return small is not None and not small.expired()

    def note(self, result: Any) -> None:
        """A small result lies on the device."""
        if isinstance(result, torch.Tensor) and not self.on_device(result) and not self.is_host(result):
            storage = result.untyped_storage()
            self._small[storage._cdata] = StorageWeakRef(storage)
            if len(self._small) > 1 << 16:
                self._small = {key: alive for key, alive in self._small.items() if not alive.expired()}

    def zeros(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the shape, strides and dtype of `like` (on the meta device), with a storage of its own."""
        if like.numel() <= SMALL:
            small = torch.zeros(like.shape, dtype=like.dtype)
            self.note(small)
            return small
        numel = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        return torch.frombuffer(self._map, dtype=like.dtype, count=numel).as_strided(like.shape, like.stride())


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in arguments or results."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))


def _key(value: Any) -> Any:
    """The same for arguments that are alike."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = tree_map_only(torch.Tensor, _as_meta, (args, {**kwargs}))
    if "device" in kwargs:
        kwargs["device"] = torch.device("meta")
    return func(*args, **kwargs)


def _as_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
