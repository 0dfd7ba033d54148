"""AdamW on a range of a slice, bit for bit what torch.optim.AdamW computes on a whole parameter.

The operations and their order are those of torch's `_single_tensor_adamw` (the default on the CPU, and equal to the
foreach form). They act element by element, so cutting a slice into ranges changes no bit. torch's fused kernel is twice
as fast, but its last bits differ from the default's. An accelerator has it all the same: there blocks are ten launches
for each 128K elements, and a model of 8B parameters takes 580,000 of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.model_state import ADAMW, OptimizerState


@dataclass(frozen=True)
class AdamW(Kernel):
    """The settings of AdamW for one step: see Kernel."""

    state: ClassVar[OptimizerState] = ADAMW
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        step: int,
    ) -> None:
        """Update `param`, `exp_avg` and `exp_avg_sq` (fp32, 1-D, one length) in place; `grad` is scaled in place.

        `step` counts this parameter's updates from 1.
        """
        if self.fused:
            self._update_fused(param, grad, exp_avg, exp_avg_sq, step)
            return
        bias_correction1 = 1 - self.beta1**step
        bias_correction2_sqrt = (1 - self.beta2**step) ** 0.5
        step_size = self.lr / bias_correction1
        for p, g, m, v in self.blocks(param, grad, exp_avg, exp_avg_sq):
            p.mul_(1 - self.lr * self.weight_decay)
            m.lerp_(g, 1 - self.beta1)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            denominator = (v.sqrt() / bias_correction2_sqrt).add_(self.eps)
            p.addcdiv_(m, denominator, value=-step_size)

    def _update_fused(
        self, param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, step: int
    ) -> None:
        if self.clip is not None:
            grad.mul_(self.clip)
        torch._fused_adamw_(
            [param], [grad], [exp_avg], [exp_avg_sq], [],
            [torch.full((), step, dtype=torch.float32, device=param.device)],
            lr=self.lr, beta1=self.beta1, beta2=self.beta2, weight_decay=self.weight_decay, eps=self.eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip
