"""What a program that connects to a host, ssh or srun, prints to stderr."""

from __future__ import annotations

import fcntl
import os
import time

_MOST_LINES = 200
_MOST_BYTES = 1 << 18
_LOGGED_IN = "Authenticated to "
_IDLE_TALK = (
    _LOGGED_IN, "Transferred: ", "Bytes per second: ", "debug", "Warning: Permanently added",
    "srun: cluster configuration lacks support for cpu binding",
)  # fmt: skip


class Said:
    """Keeps the first of it in memory that takes no more, `file`: so nobody has to listen to each of many hosts."""

    def __init__(self) -> None:
        self.file = os.fdopen(os.memfd_create("zinf-said", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+b", buffering=0)
        self.file.truncate(_MOST_BYTES)
        fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)  # what comes then is lost, and disturbs nobody
        self._logged_in: float | None = None

    @property
    def logged_in(self) -> float | None:
        """time.monotonic() of when an ssh was first seen to have logged in.

        None before, and always for a session in a connection of the user's own.
        """
        if self._logged_in is None and any(line.startswith(_LOGGED_IN) for line in self._all()):
            self._logged_in = time.monotonic()
        return self._logged_in

    @property
    def lines(self) -> list[str]:
        """The last lines that were kept, but idle talk. What the program has started may still write."""
        return [line for line in self._all() if line and not line.startswith(_IDLE_TALK)][-_MOST_LINES:]

    def close(self) -> None:
        self.file.close()

    def _all(self) -> list[str]:
        descriptor = self.file.fileno()
        text = os.pread(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR), 0)
        return [line.strip() for line in text.decode(errors="replace").splitlines()]
