"""Dynamic loss scaling for fp16, with the rules and constants of torch.amp.GradScaler."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class LossScale:
    """Doubles after `growth_interval` finite steps, halves after a step that is not finite.

    It is a power of two, so scaling is exact.
    """

    scale: float = 2.0**16
    growth_interval: int = 2000
    finite_steps: int = 0

    def takes(self, *, finite: bool, loss: float) -> bool:
        """Note how a step ended. False if it was not `finite`, and not for its scale; then nothing changes.

        It is not the scale if the `loss` is not finite either, or nothing is scaled up.
        """
        if not finite and not (math.isfinite(loss) and self.scale > 1):
            return False
        self.note(finite=finite)
        return True

    def note(self, *, finite: bool) -> None:
        """A step has ended. If it was not `finite`, its update was dropped."""
        if not finite:
            self.scale, self.finite_steps = self.scale / 2, 0
            return
        self.finite_steps += 1
        if self.finite_steps == self.growth_interval:
            self.scale, self.finite_steps = self.scale * 2, 0
