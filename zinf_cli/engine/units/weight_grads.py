"""Gradients of weights that an accelerator adds up inside of the product that makes them.

autograd makes the gradient of a 16-bit weight in 16 bits, for each micro-batch, and adds it to the fp32 sum: 12 bytes
of memory traffic for a parameter, which take as long as a third of the product over 2048 tokens. A product that adds to
its result moves 8 while other blocks multiply, and rounds nothing to 16 bits in between. So these gradients differ from
plain PyTorch's by what it rounds away; they are the same wherever the state lies. On a CPU, and where torch has no such
kernel, all is left to autograd.

The same goes for a head whose loss is computed in chunks (chunked_loss.py). An Embedding's gradient has a row for each
token that was looked up, and zeros, which are neither made nor added: the rows are added to those of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zinf_cli.engine.units.forwards import replace_forward
from zinf_cli.engine.units.tiles import Tile
from zinf_cli.tiers.streams import streams_of


def add_up_in_products(
    model: nn.Module, device: torch.device, touched: Mapping[int, Callable[[], None]]
) -> list[Callable[[], None]]:
    """Have 16-bit weights get their gradients so, those by whose `id` there is a call in `touched`.

    It is called when the weight has got a gradient. Returns what undoes it.
    """
    if streams_of(device).on_cpu or not _has_kernel(device):
        return []
    undo = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or id(weight) not in touched or weight.dtype.itemsize != 2 or "forward" in vars(module):
            continue
        if type(module) is nn.Linear:
            undo.append(replace_forward(module, partial(_forward, module, touched[id(weight)])))
        elif type(module) is nn.Embedding and not (module.max_norm or module.scale_grad_by_freq or module.sparse):
            undo.append(replace_forward(module, partial(_look_up, module, touched[id(weight)])))
        elif isinstance(module, Tile):
            weight.add_product = partial(_add_gradient, weight, touched[id(weight)])  # type: ignore[attr-defined]
            undo.append(partial(delattr, weight, "add_product"))
    return undo


def adds_products(weight: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
    """What adds the product of two matrices to the gradient of `weight`, if it is added up so; else None."""
    return getattr(weight, "add_product", None) if weight.grad is not None else None


def _add_gradient(weight: torch.Tensor, touched: Callable[[], None], first: torch.Tensor, second: torch.Tensor) -> None:
    assert weight.grad is not None
    _add_product(weight.grad, first, second)
    touched()


def _add_product(into: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    """Add the product of two 16-bit matrices to `into` (fp32)."""
    torch.ops.aten.addmm.dtype_out(into, first, second, torch.float32, out=into)


def _has_kernel(device: torch.device) -> bool:
    """Whether torch can do that on `device`: its versions differ, so it is asked to."""
    into = torch.ones(16, 16, device=device)
    factor = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    try:
        _add_product(into, factor, factor)
    except RuntimeError:
        return False
    return into.tolist() == [[17.0] * 16] * 16


def _forward(linear: nn.Linear, touched: Callable[[], None], input: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled() or torch.is_autocast_enabled(input.device.type):
        return F.linear(input, linear.weight, linear.bias)
    product: torch.Tensor = _Product.apply(input, linear.weight, linear.bias, linear, touched)  # type: ignore[no-untyped-call]
    return product


def _look_up(embedding: nn.Embedding, touched: Callable[[], None], input: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return F.embedding(input, embedding.weight)
    rows: torch.Tensor = _Rows.apply(embedding.weight, input, embedding, touched)  # type: ignore[no-untyped-call]
    return rows


class _Rows(torch.autograd.Function):
    """F.embedding whose backward adds the gradients of rows to the sum that is bound to the parameter."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, ids: torch.Tensor, embedding: nn.Embedding, touched: Callable[[], None]
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.embedding, ctx.has_gradient = embedding, touched
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        into, unlearned = ctx.embedding.weight.grad, ctx.embedding.padding_idx
        if into is None:  # autograd has it
            none = -1 if unlearned is None else unlearned
            dense = torch.ops.aten.embedding_dense_backward(grad, ids, len(ctx.embedding.weight), none, False)
            return dense, None, None, None
        if unlearned is not None:
            grad = grad.masked_fill((ids == unlearned).unsqueeze(-1), 0.0)
        into.index_put_((ids,), grad.to(into.dtype), accumulate=True)  # in one order, unlike index_add_
        ctx.has_gradient()
        return None, None, None, None


class _Product(torch.autograd.Function):
    """F.linear whose backward adds the gradient of the weight to the sum that is bound to the parameter."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        linear: nn.Linear,
        touched: Callable[[], None],
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.linear, ctx.has_gradient = linear, touched
        return F.linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        input, weight = ctx.saved_tensors
        of_input = of_weight = of_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            of_input = (rows @ weight).view(input.shape)
        if ctx.needs_input_grad[1]:
            factors, into = (rows.T, input.reshape(-1, input.shape[-1])), ctx.linear.weight.grad
            if into is None:  # autograd has it
                of_weight = torch.mm(*factors)
            else:
                _add_product(into, *factors)
                ctx.has_gradient()
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_input, of_weight, of_bias, None, None
