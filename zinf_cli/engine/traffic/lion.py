"""Lion on a range of a slice: the sign of a moment moves a weight (arXiv 2302.06675, algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.model_state import LION, OptimizerState


@dataclass(frozen=True)
class Lion(Kernel):
    """The settings of Lion for one step: see Kernel."""

    state: ClassVar[OptimizerState] = LION
    lr: float
    beta1: float = 0.9
    beta2: float = 0.99

    def update(self, param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, step: int) -> None:
        """Update `param` and `exp_avg` (fp32, 1-D, one length) in place; `grad` is scaled in place."""
        for p, g, m in self.blocks(param, grad, exp_avg):
            p.mul_(1 - self.lr * self.weight_decay)
            p.add_(m.lerp(g, 1 - self.beta1).sign_(), alpha=-self.lr)
            m.lerp_(g, 1 - self.beta2)
