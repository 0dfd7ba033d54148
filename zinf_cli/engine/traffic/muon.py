"""Muon on whole hidden matrices, bit for bit torch.optim.Muon; AdamW on the rest.

The step of a matrix is a Newton-Schulz iteration on its momentum, for which it has to be there as a whole. torch's
adjustment `match_rms_adamw` (arXiv 2502.16982) gives it the size of a step of AdamW, so both have one learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, muon

from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.model_state import MUON, OptimizerState


@dataclass(frozen=True)
class Muon(Kernel):
    """The settings of Muon for one step, and of the AdamW beside it: see Kernel."""

    state: ClassVar[OptimizerState] = MUON
    lr: float
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    """The last three are AdamW's."""
    shape: torch.Size | None = None
    """Of the matrix that `update` gets."""

    def of(self, shape: torch.Size | None) -> Kernel:
        """See Kernel."""
        if shape is not None:
            return replace(self, shape=shape)
        return AdamW(
            self.lr, self.beta1, self.beta2, self.eps,
            weight_decay=self.weight_decay, no_decay=self.no_decay, clip=self.clip, fused=self.fused,
        )  # fmt: skip

    def update(self, param: torch.Tensor, grad: torch.Tensor, momentum_buffer: torch.Tensor, step: int) -> None:
        """Update all elements of a matrix (fp32, 1-D) and its `momentum_buffer` in place; `grad` is scaled in place."""
        assert self.shape is not None
        if self.clip is not None:
            grad.mul_(self.clip)
        param, grad, momentum_buffer = (tensor.view(self.shape) for tensor in (param, grad, momentum_buffer))
        muon(
            [param], [grad], [momentum_buffer], lr=self.lr, weight_decay=self.weight_decay, momentum=self.momentum,
            nesterov=True, ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C), ns_steps=DEFAULT_NS_STEPS, eps=EPS,
            adjust_lr_fn="match_rms_adamw", has_complex=False,
        )  # fmt: skip
