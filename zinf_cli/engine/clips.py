"""Whether the next step's gradient is expected to be clipped, from the steps before it.

An update in the backward pass is made in vain where the norm then clips: its bytes moved for nothing, and the next
forward makes it again. Where the norm clips nothing, it takes work off the next forward. So it pays where fewer than
about half of the steps clip. The share of steps that do changes as training goes on; recent steps count most.
"""

from __future__ import annotations

NEWEST = 0.25
"""What the newest step counts for in the share. The steps before it count for the rest."""


class Clips:
    """The share of steps that clipped, exponentially weighted. It is the same on all ranks, as the norm is."""

    def __init__(self) -> None:
        self.share = 0.75
        """Training usually begins with large gradients: two steps that do not clip are needed to believe otherwise."""

    def count(self, *, clipped: bool) -> None:
        """Take in one more step."""
        self.share += NEWEST * (clipped - self.share)

    @property
    def expected(self) -> bool:
        """Whether the next step is expected to clip."""
        return self.share >= 0.5
