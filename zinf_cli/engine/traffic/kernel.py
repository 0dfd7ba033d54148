"""An optimizer as the engine sees it: the state it declares (model_state.py) and what it does to a range of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch

from zinf_cli.model_state import BLOCK_NUMEL, OptimizerState


@dataclass(frozen=True)
class Kernel(ABC):
    """An optimizer's settings for one step.

    The gradient is multiplied by `clip` (fp32 scalar tensor), as clip_grad_norm_ does; None stands for 1.
    """

    state: ClassVar[OptimizerState]
    weight_decay: float = field(default=0.01, kw_only=True)
    no_decay: frozenset[str] = field(default=frozenset(), kw_only=True)
    """Names of parameters that have no weight decay: those are updated by `undecayed`."""
    clip: torch.Tensor | None = field(default=None, kw_only=True)
    fused: bool = field(default=False, kw_only=True)
    """Whether to launch as little as can be, with torch's fused kernel where there is one: for an accelerator."""

    def check_state(self, kept: OptimizerState) -> None:
        """AssertionError if a run that keeps this state has another optimizer; its fields may have fewer bits."""
        assert self.state.name == kept.name, f"{self.state.name} does not update what {kept.name} keeps"

    @abstractmethod
    def update(self, param: torch.Tensor, grad: torch.Tensor, *fields_and_step: Any) -> None:
        """Update `param` and the fields of `state` in place; `grad` may be multiplied by `clip`, and stays otherwise.

        A speculative update has no `clip`. If the step clips after all, the gradient is used once more.

        `fields_and_step` are the fields, in the order of `state`, and last the step: it counts these parameters'
        updates from 1. All tensors are 1-D and of one length; `param` and `grad` are fp32. A call
        may get any range of a slice.
        """

    def of(self, shape: torch.Size | None) -> Kernel:
        """The kernel for a hidden matrix of this shape, if it updates those whole; None: the one for all else."""
        return self

    def undecayed(self) -> Self:
        """The same without weight decay."""
        return replace(self, weight_decay=0.0)

    def blocks(self, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Ranges of the tensors, one after another, as the compute device likes them; the gradient is the second.

        It is clipped here.
        """
        size = tensors[0].numel() if self.fused else BLOCK_NUMEL
        for start in range(0, tensors[0].numel(), size or 1):
            block = tuple(tensor[start : start + size] for tensor in tensors)
            if self.clip is not None:
                block[1].mul_(self.clip)
            yield block
