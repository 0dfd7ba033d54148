"""Limits a wait for another process, by a process that may be stopped itself while it waits.

Standard library only: the supervisor brings this file to hosts of which nothing is known yet.
"""

from __future__ import annotations

import math
import time

_OVERSLEPT_S = 3.0
"""With more between two looks, the waiting process was stopped or had no time, and messages may lie unread."""


class Patience:
    """Lasts for `seconds`. The waiting process has to look about once a second or more often.

    A suspended machine, SIGSTOP or Ctrl-Z stops the waiting process. It then hears nothing, however lively the other
    side is. So the seconds are counted anew.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        """Count the seconds anew, because the other side was heard."""
        self._held = False
        self._looked = self._heard = time.monotonic()
        self._until = self._looked + self._seconds

    def hold(self) -> None:
        """Wait without a limit until the other side is heard again: it has said that it will be stopped."""
        self._held = True

    @property
    def is_over(self) -> bool:
        """Whether the seconds are over. To be asked after a look at what has come in."""
        now = time.monotonic()
        if now - self._looked > _OVERSLEPT_S and not self._held:
            self.renew()
        self._looked = now
        return now >= self._until and not self._held

    @property
    def waited_s(self) -> float:
        """Seconds since the other side was heard."""
        return time.monotonic() - self._heard

    @property
    def has_end(self) -> bool:
        return math.isfinite(self._seconds)
