"""Checks that a unit computes the same when it runs again. If it does not, its gradient is that of another function.

Arguments and the model's own state are put back before a recompute. The rest can't be seen: an argument that is changed
out of autograd's sight (`x.data += 1`), a generator or an iterator among the arguments, code that asks whether a
gradient is wanted. So in the first step a few values of each result are kept, and the recompute's are compared to them.

Kernels may differ in the last digits with and without a gradient. Then single tokens of a mixture of experts may take
another route. So a result counts as different only where many of its values are far apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zinf_cli.errors import ModelError

VALUES = 256
"""Most values that are kept of each result, evenly spread."""
FAR = 0.05
"""Values that differ by more are far apart, as a share of the largest value that was kept."""
MANY = 0.1
"""The share of values that has to be far apart for a result to be different."""


def some_of(results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of up to VALUES values of each of `results` (floating or complex, any shape), 1-D."""
    flats = [result.detach().reshape(-1) for result in results]
    return [flat[:: -(-flat.numel() // VALUES) or 1].clone() for flat in flats]


def compare(unit: str, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> None:
    """ModelError where the values (`some_of`) of a unit's forward and of its recompute are different."""
    if len(first) != len(second) or not all(map(_alike, first, second)):
        raise differs(unit)


def differs(unit: str) -> ModelError:
    """The error to raise where the recompute of `unit` is another computation than its forward."""
    return ModelError(
        f"{unit} computes something else when it runs again in backward: it changes an argument out of autograd's "
        "sight (.data, numpy), draws from a generator or an iterator among its arguments, or asks whether a gradient "
        "is wanted",
        hint="keep its activations instead: activation_checkpointing=none",
    )


def _alike(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    scale = one.abs().nan_to_num(0.0, 0.0, 0.0).max().item() if one.numel() else 0.0
    close = torch.isclose(one, two, rtol=0.0, atol=FAR * scale, equal_nan=True)
    return int((~close).sum()) <= MANY * one.numel()
