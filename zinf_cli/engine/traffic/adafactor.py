"""Adafactor (arXiv 1804.04235) on whole parameters, bit for bit torch.optim.Adafactor.

Of the squares of a matrix's gradient it keeps means of rows and of columns, so its state is small. Its step follows
from means over all of a parameter: every parameter has to be there as a whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.optim._adafactor import _single_tensor_adafactor

from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.model_state import ADAFACTOR, OptimizerState

_BETA2_DECAY, _LEAST_SCALE, _LARGEST_UPDATE = -0.8, 1e-3, 1.0
"""torch's defaults: beta2_decay, the second eps, d."""


@dataclass(frozen=True)
class Adafactor(Kernel):
    """The settings of Adafactor for one step: see Kernel."""

    state: ClassVar[OptimizerState] = ADAFACTOR
    lr: float
    shape: torch.Size | None = None
    """Of the parameter that `update` gets."""

    def of(self, shape: torch.Size | None) -> Kernel:
        """See Kernel."""
        return replace(self, shape=shape)

    def update(self, param: torch.Tensor, grad: torch.Tensor, factors: torch.Tensor, step: int) -> None:
        """Update all elements of a parameter (fp32, 1-D) in place; `grad` is scaled in place.

        `factors` (fp32, 1-D) has the means of rows, then those of columns; of a vector, the mean of each square.
        """
        assert self.shape is not None
        if self.clip is not None:
            grad.mul_(self.clip)
        rows, columns, squares = None, None, None
        if len(self.shape) > 1:
            *outer, height, width = self.shape
            rows = factors[: math.prod(outer) * height].view(*outer, height, 1)
            columns = factors[math.prod(outer) * height :].view(*outer, 1, width)
        else:
            squares = factors.view(self.shape)
        _single_tensor_adafactor(
            [param.view(self.shape)], [grad.view(self.shape)], [rows], [columns], [squares],
            [torch.tensor(float(step - 1))], None, None, d=_LARGEST_UPDATE, lr=self.lr, beta2_decay=_BETA2_DECAY,
            weight_decay=self.weight_decay, eps1=None, eps2=_LEAST_SCALE, maximize=False, has_complex=False,
        )  # fmt: skip
