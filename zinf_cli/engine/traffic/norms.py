"""The norm of a step's gradient, from norms that are taken while it passes by, unit by unit.

On one rank it is what clip_grad_norm_ gives, to the bit: the norm of the norms of all parameters, in their order. A
parameter that was cut has the norm of the norms of its tiles. One that packs a layer's experts, which the model
computes one after another, has that of the norms of its experts, also where it is whole: so the norm does not depend on
whether experts are parts. clip_grad_norm_ adds up such a parameter in one chain, which gives other last bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.units.store import Unit
from zinf_cli.engine.units.units import ParamLayout


class GradientNorms:
    """The norms of one step after another."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._params: dict[int, dict[int, torch.Tensor]] = {}
        """By index of a parameter: norms of its ranges, by their first elements (fp32 scalars)."""
        self._experts: dict[int, torch.Size] = {}
        """The shapes of parameters that pack experts, by index."""
        self._slices: dict[tuple[str, int], torch.Tensor] = {}
        """With several ranks: the norm of this rank's slice of each flat (fp64 scalars)."""

    def begin_step(self) -> None:
        """Forget those of the step before."""
        self._params.clear()
        self._slices.clear()

    def note(self, unit: Unit, own: Sequence[torch.Tensor]) -> None:
        """Take those of a unit's gradient, in place of any that were taken of it before.

        `own` are this rank's slices of it (fp32, 1-D), one per trainable flat.
        """
        for flat, values in zip(unit.trained, own, strict=True):
            if self._ranks.world_size > 1:
                self._slices[unit.name, flat.number] = torch.linalg.vector_norm(values).double()
                continue
            for place, touched in zip(flat.layout.params, flat.touched, strict=True):
                if touched:
                    ranges = self._params.setdefault(place.index, {})
                    for first, grad in _ranges(place, values):
                        ranges[first] = torch.linalg.vector_norm(grad)
                    if place.packs_experts:
                        self._experts[place.index] = place.shape if place.part is None else place.part.shape

    def total(self) -> torch.Tensor:
        """The 2-norm over all gradients (fp32 scalar). All ranks take part."""
        if self._ranks.world_size > 1:
            squares = sum((norm**2 for norm in self._slices.values()), torch.zeros((), dtype=torch.float64))
            return self._ranks.sum(squares.cpu()).sqrt().float()
        norms = [_norm(ranges, self._experts.get(index)) for index, ranges in sorted(self._params.items())]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _ranges(place: ParamLayout, flat: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The gradients whose norms are taken, by the element of the parameter with which each begins."""
    grads = place.view(flat) if place.packs_experts else [place.view(flat)]
    for number, grad in enumerate(grads):
        yield place.first + number * grad.numel(), grad


def _norm(ranges: Mapping[int, torch.Tensor], experts: torch.Size | None) -> torch.Tensor:
    """Of a parameter, which has the shape `experts` if it packs some. The gradient of those without a norm is zeros."""
    if experts is None:
        found = [norm for _, norm in sorted(ranges.items())]
    else:
        zero = next(iter(ranges.values())).new_zeros(())
        found = [ranges.get(first, zero) for first in range(0, experts.numel(), experts[1:].numel())]
    return found[0] if len(found) == 1 else torch.linalg.vector_norm(torch.stack(found))
