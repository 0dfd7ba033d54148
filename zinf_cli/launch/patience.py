"""How long to wait for another process, by one that may itself be stopped meanwhile.

Standard library only: a supervisor takes this file along to hosts of which nothing is known yet.
"""

from __future__ import annotations

import math
import time

_OVERSLEPT_S = 3.0
"""More than this between two looks: the one who waits was paused, or had no time, and what came may lie unread."""


class Patience:
    """Lasts for `seconds` in which whoever waits looks again and again, about once a second or more often.

    A suspended machine, SIGSTOP or Ctrl-Z stops the one who waits. It then hears nothing however lively the other side
    is, so the count starts anew.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        """Start the count anew: the other side was heard."""
        self._held = False
        self._looked = time.monotonic()
        self._until = self._looked + self._seconds

    def hold(self) -> None:
        """Wait however long, until the other side is heard again: it has said that it will be stopped."""
        self._held = True

    @property
    def is_over(self) -> bool:
        """Whether it is used up. To be asked after a look at what has come in."""
        now = time.monotonic()
        if now - self._looked > _OVERSLEPT_S and not self._held:
            self.renew()
        self._looked = now
        return now >= self._until and not self._held

    @property
    def has_end(self) -> bool:
        return math.isfinite(self._seconds)
