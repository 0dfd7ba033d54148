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

    `clip` (fp32 scalar tensor) multiplies the gradient, as clip_grad_norm_ does.
    """

    state: ClassVar[OptimizerState]
    clip: torch.Tensor | None = field(default=None, kw_only=True)

    @abstractmethod
    def update(self, param: torch.Tensor, grad: torch.Tensor, *fields_and_step: Any) -> None:
        """Update `param` and the fields of `state`, in their order, in place (1-D, one length); `grad` is scratch.

        `param` and `grad` are fp32. The step, which comes last, counts these parameters' updates from 1. Where the
        state's grain is an element, any range may come by itself.
        """
