"""Calls modules that compute each token by itself with chunks of tokens: the inside of one chunk lives at a time.

The MLP of a block widens every token several times, so it saves most of what a long sequence takes. `in_chunks`
replaces the forward of such a module, after row_wise.py has proved that it may. Autograd saves its input; its backward
runs the forward of each chunk again, then that chunk's backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from zinf_cli.engine.units.row_wise import RowWise, proof

CHUNKS, LEAST = 16, 256
"""Into how many chunks a sequence is cut, and the fewest tokens of one. Each chunk adds to the weights' gradients:
with 256 tokens an MLP of 512 × 4096 took 1.27 times as long, with 128 tokens 1.53 times."""


@dataclass(frozen=True)
class Chunkable:
    """A module that may be called with chunks."""

    path: str
    shape: tuple[int, ...]
    """Of its input, in chunks along the last dimension but one."""
    spared_bytes: int
    """What autograd saves inside for all tokens, beside input and result, less the same for a chunk."""
    numel: int
    """Elements of its parameters."""


Inputs = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of the last input of each module that is called with one tensor alone."""


@contextmanager
def noted_inputs(model: nn.Module) -> Iterator[Inputs]:
    """A context that notes inputs of modules that have others inside; they are there when it ends."""
    noted: Inputs = {}
    calls: SimpleQueue[tuple[str, tuple[tuple[int, ...], torch.dtype] | None]] = SimpleQueue()
    put = calls.put  # a survey puts back what it can reach, such as a dict (carriers.py)
    hooks = []
    for path, module in model.named_modules():

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            alone = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
            put((path, (tuple(args[0].shape), args[0].dtype) if alone else None))

        if any(True for _ in module.children()):
            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()
        last = dict(calls.get() for _ in range(calls.qsize()))
        noted.update((path, given) for path, given in last.items() if given is not None)


def find_chunkable(unit: nn.Module, path: str, inputs: Inputs) -> Iterator[Chunkable]:
    """The outermost modules inside of `unit` that may be called with chunks. Its parameters are on the meta device."""
    for name, module in unit.named_children():
        inside = f"{path}.{name}"
        found = _chunkable(module, inside, *inputs[inside]) if inside in inputs else None
        if found is not None:
            yield found
        else:
            yield from find_chunkable(module, inside, inputs)


def tokens_of_a_chunk(tokens: int) -> int:
    return max(LEAST, -(-tokens // CHUNKS))


def in_chunks(module: nn.Module, shape: Sequence[int]) -> None:
    """Have `module` computed in chunks where its input has `shape`."""
    own, expected = module.forward, tuple(shape)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if (
            len(args) != 1
            or kwargs
            or tuple(args[0].shape) != expected
            or torch.is_autocast_enabled(args[0].device.type)
        ):
            return own(*args, **kwargs)
        learns = any(param.requires_grad for param in module.parameters())
        anchor = torch.zeros((), device=args[0].device, requires_grad=learns)
        return _InChunks.apply(anchor, args[0], own)  # type: ignore[no-untyped-call]

    module.forward = forward


def _chunkable(module: nn.Module, path: str, shape: tuple[int, ...], dtype: torch.dtype) -> Chunkable | None:
    if len(shape) < 2 or shape[-2] <= (count := tokens_of_a_chunk(shape[-2])):
        return None
    if (whole := proof(module, shape, dtype)) is None:
        return None
    found: list[RowWise] = []
    for tokens in {count, shape[-2] % count} - {0}:
        part = proof(module, (*shape[:-2], tokens, shape[-1]), dtype)
        if part is None or part.operations != whole.operations:
            return None
        found.append(part)
    spared = whole.saved_bytes - max(part.saved_bytes for part in found)
    return Chunkable(path, shape, spared, sum(p.numel() for p in module.parameters())) if spared > 0 else None


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, input: torch.Tensor, own: Callable[..., Any]) -> torch.Tensor:
        """`anchor` has a gradient, so that there is a graph where only weights have one."""
        ctx.save_for_backward(input)
        ctx.own = own
        return torch.cat([own(chunk) for chunk in _split(input)], dim=-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (input,) = ctx.saved_tensors
        found: list[torch.Tensor] = []
        for chunk, of_chunk in zip(_split(input), _split(grad), strict=True):
            leaf = chunk.detach().requires_grad_(ctx.needs_input_grad[1])
            with torch.enable_grad():
                result = ctx.own(leaf)
            torch.autograd.backward((result,), (of_chunk,))
            if leaf.grad is not None:
                found.append(leaf.grad)
        return None, torch.cat(found, dim=-2) if found else None, None


def _split(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    chunks: Sequence[torch.Tensor] = tensor.split(tokens_of_a_chunk(tensor.shape[-2]), dim=-2)
    return chunks
