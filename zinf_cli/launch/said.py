"""What a program that connects to a host, ssh or srun, prints to stderr."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import IO

_MOST_LINES = 200
_LOGGED_IN = "Authenticated to "
_IDLE_TALK = (
    _LOGGED_IN, "Transferred: ", "Bytes per second: ", "debug", "Warning: Permanently added",
    "srun: cluster configuration lacks support for cpu binding",
)  # fmt: skip


class Said:
    """Collects it in a thread until the program ends: `lines`, and when the login of an ssh was done."""

    def __init__(self, stderr: IO[bytes] | None) -> None:
        assert stderr is not None
        self._stderr = stderr
        self._lines: deque[str] = deque(maxlen=_MOST_LINES)
        self.logged_in: float | None = None
        """time.monotonic() of it. None before, and always for a session in a connection of the user's own."""
        self._listener = threading.Thread(target=self._listen, name="hears stderr", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        for line in self._stderr:
            text = line.decode(errors="replace").strip()
            if text.startswith(_LOGGED_IN):
                self.logged_in = time.monotonic()
            if text and not text.startswith(_IDLE_TALK):
                self._lines.append(text)

    @property
    def lines(self) -> list[str]:
        """All of it but idle talk. To be asked once the program is over; what it has started may still write."""
        self._listener.join(1.0)
        return list(self._lines)
