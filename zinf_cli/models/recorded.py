"""Records the operations that make a parameter, and makes any range of it without memory for the whole.

Note "ranges of a draw". torch draws from one serial stream, normal values in groups of 16. So a draw may be made in
pieces, one after the other. The values are the same to the bit if each piece but the last has a multiple of 16
elements. If the last group is not full, torch draws the last 16 elements anew. So the last piece has 16 or more.

A `Recorded` tensor says that it lies on the CPU, but it has no memory. What is done to it in place is noted in its
`Recording`. A draw moves torch's generator as it always would: the pieces are drawn into one buffer, and thrown away.
The generator's state before each piece is kept, 5 KiB for 1 MiB of values. To make a range, what was noted is done to
it. Each piece that it touches is drawn again from its state.

Some operations can't be done to a range: orthogonal matrices, a rejected tail that is drawn again. They make the tensor
real first. Such a parameter is held whole from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

_PIECE = 1 << 18  # elements that are drawn at once: a multiple of 16

_aten = torch.ops.aten
_DRAWN = (_aten.normal_.default, _aten.uniform_.default)
_FILLED = (_aten.zero_.default, _aten.fill_.Scalar)


class Recording:
    """What has been done to a float32 parameter of `shape`, NaN at first. `real` is one that is held whole."""

    def __init__(self, shape: torch.Size, real: torch.Tensor | None = None) -> None:
        self._shape = shape
        self._real = real
        self._steps: list[_Step] = []

    def tensor(self) -> torch.Tensor:
        """The real parameter, or a tensor of its shape that notes what is done to it."""
        return Recorded(self, torch.empty(self._shape, device="meta")) if self._real is None else self._real

    def read(self, first: int, last: int) -> torch.Tensor:
        """Elements [first, last) of the flat parameter. Takes memory for them and one piece. No generator moves."""
        if self._real is not None:
            return self._real.reshape(-1)[first:last]
        values = torch.full((last - first,), float("nan"))
        for step in self._steps:
            step.replay(values, first, last)
        return values

    @property
    def is_real(self) -> bool:
        return self._real is not None

    def whole(self) -> torch.Tensor:
        """The real parameter. It is held from now on."""
        if self._real is None:
            self._real = self.read(0, self._shape.numel()).view(self._shape)
            self._steps.clear()
        return self._real

    def is_incomplete(self) -> bool:
        """Whether some element is still NaN."""
        if self._real is not None:
            return bool(self._real.isnan().any())
        end = 0
        for step in sorted(self._steps, key=lambda step: step.first):
            if step.first <= end:
                end = max(end, step.last)
        return end < self._shape.numel()

    def note(self, func: Callable[..., Any], first: int, last: int, args: Sequence[Any]) -> None:
        """Note that `func` with `args` is done to elements [first, last). If it draws, torch's generator moves."""
        if (first, last) == (0, self._shape.numel()):  # what was there is gone
            self._steps.clear()
        self._steps.append(_Step(func, first, last, args, _draw(func, last - first, args) if func in _DRAWN else []))


@dataclass(frozen=True)
class _Step:
    """One operation on the elements [first, last), and the generator's states before the pieces that it drew."""

    func: Callable[..., Any]
    first: int
    last: int
    args: Sequence[Any]
    states: list[torch.Tensor]

    def replay(self, values: torch.Tensor, first: int, last: int) -> None:
        """Do the operation to those of `values`, elements [first, last) of the parameter, that it was done to."""
        start, end = max(first, self.first), min(last, self.last)
        if start >= end:
            return
        if not self.states:
            self.func(values[start - first : end - first], *self.args)
            return
        generator = torch.Generator()
        for (begin, stop), state in zip(_pieces(self.last - self.first), self.states, strict=True):
            low, high = max(start, self.first + begin), min(end, self.first + stop)
            if low < high:
                piece = torch.empty(stop - begin)
                self.func(piece, *self.args, generator=generator.set_state(state))
                values[low - first : high - first] = piece[low - self.first - begin : high - self.first - begin]


def _pieces(num_elements: int) -> list[tuple[int, int]]:
    """[first, last) of each piece of a draw of `num_elements`: the note "ranges of a draw"."""
    starts = range(0, max(1, num_elements - 15), _PIECE)
    return list(zip(starts, [*starts[1:], num_elements], strict=True))


def _draw(func: Callable[..., Any], num_elements: int, args: Sequence[Any]) -> list[torch.Tensor]:
    """Move torch's generator as a draw of `num_elements` does. Returns its state before each piece."""
    states = []
    buffer = torch.empty(min(num_elements, _PIECE + 15))
    for begin, stop in _pieces(num_elements):
        states.append(torch.default_generator.get_state())
        func(buffer[: stop - begin], *args)
    return states


class Recorded(torch.Tensor):
    """Stands for a Recording's parameter, or for a view of it. `on_meta` has its shape, strides and offset."""

    recording: Recording
    on_meta: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, recording: Recording, on_meta: torch.Tensor) -> Recorded:
        tensor: Recorded = torch.Tensor._make_wrapper_subclass(
            cls,
            on_meta.shape,
            strides=on_meta.stride(),
            storage_offset=on_meta.storage_offset(),
            dtype=on_meta.dtype,
            device=torch.device("cpu"),
        )
        tensor.recording, tensor.on_meta = recording, on_meta
        return tensor

    def __init__(self, recording: Recording, on_meta: torch.Tensor) -> None:
        """__new__ does all, as torch wants it."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        assert torch.Tag.inplace_view not in func.tags, f"{func} would change the shape of a parameter"
        kwargs, target = dict(kwargs or {}), args[0]
        if isinstance(target, Recorded):
            if func.is_view:
                on_meta = func(target.on_meta, *args[1:], **kwargs)
                return tree_map_only(torch.Tensor, lambda view: Recorded(target.recording, view), on_meta)
            if target._takes(func, args[1:], kwargs):
                first = int(target.on_meta.storage_offset())
                target.recording.note(func, first, first + target.numel(), args[1:])
                return target
        real_args, real_kwargs = tree_map_only(Recorded, Recorded._whole, (args, kwargs))
        result = func(*real_args, **real_kwargs)
        return target if result is real_args[0] else result

    def _takes(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the operation can be noted: it can be done to a range, and this is one that is not real yet."""
        is_plain = func in (*_DRAWN, *_FILLED) and all(value is None for value in kwargs.values())
        return is_plain and not self.recording.is_real and self.on_meta.is_contiguous()

    def _whole(self) -> torch.Tensor:
        view = self.on_meta
        return self.recording.whole().as_strided(view.shape, view.stride(), view.storage_offset())
