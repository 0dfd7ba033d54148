"""SGD with momentum on a range of a slice, bit for bit what torch.optim.SGD computes on a whole parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.model_state import SGD, OptimizerState


@dataclass(frozen=True)
class Sgd(Kernel):
    """The settings of SGD for one step: see Kernel."""

    state: ClassVar[OptimizerState] = SGD
    lr: float
    momentum: float = 0.9

    def update(self, param: torch.Tensor, grad: torch.Tensor, momentum_buffer: torch.Tensor, step: int) -> None:
        """Update `param` and `momentum_buffer` (fp32, 1-D, one length) in place; `grad` is scaled in place."""
        for p, g, m in self.blocks(param, grad, momentum_buffer):
            if self.weight_decay:
                g = g.add(p, alpha=self.weight_decay)
            m.mul_(self.momentum).add_(g)
            p.add_(m, alpha=-self.lr)
