"""Weights that a forward writes to. Plain PyTorch keeps what a forward writes; a slot loses it after the visit.

Most such writes change nothing: they set a padding row to what it is. These are allowed. The first write that changes a
weight ends the run before anything wrong is learned. (Clamps are kept: see written_weights.py.)

The survey names the weights that it has seen written to. It sees one way through the model. So every weight is
compared, by a sum of its bits, in the first step and while places move (moving_state.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zinf_cli.engine.units.forwards import replace_forward
from zinf_cli.engine.units.units import UnitLayout
from zinf_cli.errors import ModelError
from zinf_cli.tiers.streams import streams_of

PIECE = 1 << 16
"""Elements that are added up at once on the CPU."""


def hold_constant(
    model: nn.Module, layouts: Sequence[UnitLayout], written: Collection[str]
) -> list[Callable[[], None]]:
    """From now on a forward raises ModelError when it changes one of the parameters named in `written`.

    Returns the calls that undo this, to be made from the last to the first.
    """
    undo = []
    for layout in layouts:
        params = {place.name: model.get_parameter(place.name) for place in layout.params() if place.name in written}
        for path in layout.modules or ("",):
            if params:
                module = model.get_submodule(path)
                undo.append(replace_forward(module, _checked(module.forward, params)))
    return undo


@contextmanager
def constant(layout: UnitLayout, params: Sequence[torch.Tensor]) -> Iterator[None]:
    """A context in which none of a unit's `params` may change: ModelError at its end. Bounded ones are left out."""
    before = list(map(_sum, params))
    yield
    places = zip(layout.params(), params, before, strict=True)
    changed = {place.name: _sum(param) != total for place, param, total in places if place.bounds is None}
    if changed and torch.stack(list(changed.values())).any().item():  # on an accelerator one wait, and not one for each
        raise _changes(next(name for name, differs in changed.items() if differs.item()))


def _sum(param: torch.Tensor) -> torch.Tensor:
    """Of a tensor's bits, as integers of 16 or 32 bits (int64 scalar where the tensor lies).

    To add them up on the CPU, torch makes int64 of all that it is given.
    """
    flat = param.detach().reshape(-1)
    if flat.dtype is not torch.bool:
        flat = flat.view({1: torch.uint8, 2: torch.int16}.get(flat.element_size(), torch.int32))
    pieces = flat.split(PIECE) if streams_of(flat.device).on_cpu else (flat,)
    return torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).sum()


def _changes(name: str) -> ModelError:
    return ModelError(
        f"the model's forward changes its weight {name}, which is lost where weights are streamed",
        hint="switch that off in the model's configuration (a clip of weights, say)",
    )


def _checked(forward: Callable[..., Any], params: dict[str, nn.Parameter]) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        before = {name: param.detach().clone() for name, param in params.items()}
        outputs = forward(*args, **kwargs)
        for name, param in params.items():
            if not torch.equal(param.detach(), before[name]):
                raise _changes(name)
        return outputs

    return checked
