"""The vocabulary of a step: visits of units."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What is done at a stop."""

    FORWARD = "forward"
    TURN = "turn"
    """Forward and backward in one visit: of a sweep's last unit, and of the resident unit for the whole step."""
    BACKWARD = "backward"
    FLUSH = "flush"
    """Only the pending update."""
    OPEN = "open"
    """Of some of a layer's experts: which ones will be known later, when their visits take this one's place."""


@dataclass(frozen=True)
class Visit:
    """One stop at a unit."""

    unit: int
    kind: Kind
    nth: int = 0
    """How many backward visits of the unit came before in this step. The gradient is added to theirs."""
    final: bool = False
    """Whether the unit's gradient of the step is complete after this visit."""

    @property
    def accumulate(self) -> bool:
        """Whether the gradient is added to that of earlier visits of the step."""
        return self.nth > 0

    @property
    def has_grads(self) -> bool:
        """Whether the visit computes gradients."""
        return self.kind in (Kind.TURN, Kind.BACKWARD)
