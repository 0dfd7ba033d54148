"""Whether the next step's gradient is expected to be clipped, from the steps before it.

An update in the backward pass is made in vain where the norm then clips: its bytes moved for nothing, and the next
forward makes it again. Where the norm clips nothing, it takes work off the next forward. So it pays where fewer than
some share of the steps clip. The plan says which share that is, by what each kind of step takes (plan/predict.py). The
share of steps that do clip changes as training goes on; recent steps count most.
"""

from __future__ import annotations

NEWEST = 0.1
"""The least that the newest step counts for in the share. The steps before it count for the rest."""
FIRST = 2
"""Steps that are expected to clip, since training usually begins with large gradients."""


class Clips:
    """The share of steps that clipped, exponentially weighted. It is the same on all ranks, as the norm is."""

    def __init__(self, worth: float = 0.5) -> None:
        """Updates in backward pay where less than the share `worth` of the steps clips."""
        self.share = 0.0
        self._worth = worth
        self._seen = 0

    def count(self, *, clipped: bool) -> None:
        """Take in one more step."""
        self._seen += 1
        self.share += max(NEWEST, 1 / self._seen) * (clipped - self.share)

    @property
    def expected(self) -> bool:
        """Whether so many steps clip that the next one is to be treated like one that does."""
        return self._seen < FIRST or self.share >= self._worth
