"""Dynamic loss scaling for fp16, with the rules and constants of torch.amp.GradScaler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossScale:
    """Doubles after `growth_interval` finite steps, halves after a step that is not finite.

    It is a power of two, so scaling is exact.
    """

    scale: float = 2.0**16
    growth_interval: int = 2000
    finite_steps: int = 0

    def note(self, *, finite: bool) -> None:
        """A step has ended. If it was not `finite`, its update was dropped."""
        if not finite:
            self.scale, self.finite_steps = self.scale / 2, 0
            return
        self.finite_steps += 1
        if self.finite_steps == self.growth_interval:
            self.scale, self.finite_steps = self.scale * 2, 0
