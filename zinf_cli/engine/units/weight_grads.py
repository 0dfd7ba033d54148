"""Gradients of Linears' weights that an accelerator adds up inside of the product.

autograd makes the gradient of a 16-bit weight in 16 bits, for each micro-batch, and adds it to the fp32 sum: 12 bytes
of memory traffic for a parameter, which take as long as a third of the product over 2048 tokens. A product that adds to
its result moves 8 while other blocks multiply, and rounds nothing to 16 bits in between. So these gradients differ from
plain PyTorch's by what it rounds away; they are the same wherever the state lies. On a CPU, and where torch has no such
kernel, all is left to autograd.
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
from zinf_cli.tiers.streams import streams_of


def add_up_in_products(
    model: nn.Module, device: torch.device, touched: Mapping[int, Callable[[], None]]
) -> list[Callable[[], None]]:
    """Have 16-bit weights of Linears get their gradients so, those by whose `id` there is a call in `touched`.

    It is called when the weight has got a gradient. Returns what undoes it.
    """
    if streams_of(device).on_cpu or not _has_kernel(device):
        return []
    own = (module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module))
    return [
        replace_forward(linear, partial(_forward, linear, touched[id(linear.weight)]))
        for linear in own
        if id(linear.weight) in touched and linear.weight.dtype.itemsize == 2
    ]


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
