"""RMSNorms that an accelerator computes in one kernel.

A model's own code computes such a norm in seven steps, most of them in fp32: they move 32 bytes for an element, and
their backward moves three times as many. torch's fused kernel moves 4, and 6. It rounds where the model's code does,
before the weight; only how the squares are added up is the kernel's own. On a CPU all is left to the model's code.

Which modules are such norms does not follow from their names: some add one to the weight, some round after it. So each
is tried on a few values, and has to have the bits of the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from zinf_cli.engine.units.forwards import replace_forward
from zinf_cli.tiers.streams import streams_of


def fuse_norms(model: nn.Module, device: torch.device) -> list[Callable[[], None]]:
    """Have an accelerator compute the RMSNorms of `model` so, those with a 16-bit weight. Returns what undoes it."""
    if streams_of(device).on_cpu:
        return []
    found = ((norm, eps_of(norm)) for norm in model.modules() if "forward" not in vars(norm))
    return [replace_forward(norm, partial(_forward, norm, eps, norm.forward)) for norm, eps in found if eps is not None]


def eps_of(norm: nn.Module) -> float | None:
    """What the module adds to the mean of squares, if it computes what `fused` does and its weight has 16 bits."""
    weight = norm._parameters.get("weight")
    alone = len(norm._parameters) == 1 and not norm._buffers and not norm._modules
    if weight is None or not alone or weight.dim() != 1 or weight.dtype.itemsize != 2 or type(norm) is nn.RMSNorm:
        return None
    eps = next(
        (value for name in ("variance_epsilon", "eps") if isinstance(value := getattr(norm, name, None), float)), None
    )
    if eps is None:
        return None
    random = torch.Generator().manual_seed(0)
    values = torch.randn(3, weight.numel(), generator=random).to(weight.dtype)
    tried = object.__new__(type(norm))
    tried.__dict__.update(norm.__dict__, _parameters={"weight": values[2]})
    x = values[:2] * torch.tensor([[1.0], [eps**0.5]], dtype=weight.dtype)
    try:
        with torch.no_grad():
            own = type(norm).forward(tried, x)
    except Exception:  # its code may do anything
        return None
    return eps if torch.equal(own, fused(x, values[2], eps)) else None


def fused(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight` times x / sqrt(mean(x²) + eps), which is computed in fp32 and rounded before it is multiplied."""
    normed: torch.Tensor = torch.ops.aten._fused_rms_norm(x, weight.shape, None, eps)[0]
    return weight * normed


def _forward(norm: nn.Module, eps: float, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    x, weight = args[0] if len(args) == 1 and not kwargs else None, norm._parameters["weight"]
    assert weight is not None
    if not isinstance(x, torch.Tensor) or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return own(*args, **kwargs)
    return fused(x, weight, eps)
