"""The end of a log, which is what a failure is told by."""

from __future__ import annotations

import os
from pathlib import Path

_MOST_BYTES = 1 << 20
"""Bytes of a log that are looked through."""
_LONGEST = 2000
"""Characters of a line that are given."""


def last_lines(log: Path, count: int) -> list[str]:
    """The last `count` lines of a log, however long it is. Empty if it can't be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _MOST_BYTES))
            return [line[:_LONGEST] for line in file.read(_MOST_BYTES).decode(errors="replace").splitlines()[-count:]]
    except OSError:
        return []
