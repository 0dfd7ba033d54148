"""What a run takes on a host. The host's supervisor measures it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Vitals:
    """What the processes of a run take on one host, in bytes. Drive traffic counts from their start."""

    host: str
    memory: int
    read: int
    written: int
    time: float = field(default_factory=time.monotonic)
