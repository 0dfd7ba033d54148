"""A forward that leaves a model as it was: what it changes are copies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import nn

from zinf_cli.engine.compute.carriers import Reach
from zinf_cli.engine.units.tiles import Bodiless


def is_state(value: object) -> TypeGuard[torch.Tensor]:
    """Whether a value is a tensor with bytes of its own, if only on the meta device."""
    return isinstance(value, torch.Tensor) and not isinstance(value, Bodiless)


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A context in which the modules hold copies on `device` of their tensors. At its end all is as it was before.

    A forward may leave values in modules: rotary frequencies for a longer text, the longest text so far, a state.
    """
    modules = [(module, dict(module.__dict__)) for module in model.modules()]
    held = Reach([tuple(attributes.values()) for _, attributes in modules], most=sys.maxsize)
    try:
        for module, _ in modules:
            for owner in (module._buffers, module.__dict__):
                tensors = {n: value for n, value in owner.items() if is_state(value)}
                owner.update({n: value.to(device, copy=True) for n, value in tensors.items()})
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            yield
    finally:
        for module, attributes in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        held.put()
