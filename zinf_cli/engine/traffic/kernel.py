"""An optimizer as the engine sees it: the state it declares (model_state.py) and what it does to a range of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from zinf_cli.model_state import OptimizerState


@dataclass(frozen=True)
class Kernel(ABC):
    """An optimizer's settings for one step.

    The gradient is multiplied by `clip` (fp32 scalar tensor), as clip_grad_norm_ does; None stands for 1.
    """

    state: ClassVar[OptimizerState]
    clip: torch.Tensor | None = field(default=None, kw_only=True)
    fused: bool = field(default=False, kw_only=True)
    """Whether torch's fused kernel is used, where there is one: for an accelerator, where a launch has its price."""

    @abstractmethod
    def update(self, param: torch.Tensor, grad: torch.Tensor, *fields_and_step: Any) -> None:
        """Update `param` and the fields of `state` in place; `grad` may be overwritten.

        `fields_and_step` are the fields, in the order of `state`, and last the step: it counts these parameters'
        updates from 1. All tensors are 1-D and of one length; `param` and `grad` are fp32. A call
        may get any range of a slice.
        """
