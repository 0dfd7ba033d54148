"""Gives real weights to the survey of a model that asks for data. A unit has its weights only while it is called.

What autograd saves is counted and not kept. So one forward takes the memory of the largest unit, and of the tensors
between units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from zinf_cli.engine.units.store import to_placeholders
from zinf_cli.engine.units.units import UnitLayout


@dataclass(frozen=True)
class Trial:
    """Weights and device for a forward on real data."""

    read: Callable[[Sequence[str]], Mapping[str, torch.Tensor]]
    """Parameters by name, on the CPU, in any dtype."""
    device: torch.device


class TrialWeights:
    """The parameters of `model`, which become placeholders on the trial's device."""

    def __init__(self, model: nn.Module, trial: Trial) -> None:
        to_placeholders(model, trial.device)
        self._trial = trial
        self._params = dict(model.named_parameters())

    def bind(self, unit: UnitLayout) -> None:
        """Give the unit's parameters their values."""
        names = [place.name for place in unit.params()]
        for name, value in self._trial.read(names).items():
            param = self._params[name]
            param.data = value.to(self._trial.device, param.dtype, copy=True)

    def unbind(self, unit: UnitLayout) -> None:
        """Make placeholders of the unit's parameters again."""
        for place in unit.params():
            param = self._params[place.name]
            param.data = param.data.new_full((1,), math.nan).expand(place.shape)
