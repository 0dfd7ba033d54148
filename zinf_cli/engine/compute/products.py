"""Recompute without the product: a unit that is one matrix, or a tile of one, needs no result in its backward.

The gradients of a product follow from its input, its weight and the gradient of its result. So the recompute of such a
unit only has to build the graph. It runs the unit's own forward, and below autograd the product is answered by a tensor
of its shape without bytes. The graph is the one that torch would build, and so are the gradients, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from zinf_cli.engine.units.tiles import Tile, linear_rows, matmul_rows, rows_times

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1}
"""Products, with the place of the first factor among their arguments."""


def without_products() -> TorchDispatchMode:
    """A context in which products of matrices are not computed: their results have shape and dtype, and no values."""
    return _WithoutProducts()  # type: ignore[no-untyped-call]


class _WithoutProducts(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = _PRODUCTS.get(func)
        if place is None:
            return func(*args, **(kwargs or {}))
        first, second = args[place : place + 2]
        return first.new_empty(()).expand(*first.shape[:-1], second.shape[-1])


def is_one_product(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether the call of `module` with `args` returns the product of a matrix with its input, and nothing else."""
    if isinstance(module, Tile):
        return args[0] in (linear_rows, matmul_rows, rows_times)
    return type(module) is nn.Linear
