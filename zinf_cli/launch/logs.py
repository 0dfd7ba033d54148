"""What the ranks say while they run, line by line, for the console: rank 0, and everyone's warnings.

A traceback and what follows it are left to the screen that ends a failed run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from zinf_cli.hosts import Host

_WARNING = re.compile(r"warn|error|^note: ", re.IGNORECASE)
_HEADER = "--- rank "
_TRACEBACK = "Traceback (most recent call last):"


@dataclass(frozen=True)
class LogLine:
    """A line of the log of `rank`, on `host`."""

    host: str
    rank: int
    text: str


class RankLogs:
    """Follows logs/rank-*.log of a run's folder from now on; a line that several ranks write is given once."""

    def __init__(self, run_dir: Path, hosts: Sequence[Host]) -> None:
        names = [host.name for host in hosts for _ in host.slots]
        self._places = {rank: (name, run_dir / "logs" / f"rank-{rank:05d}.log") for rank, name in enumerate(names)}
        logs = {rank: path for rank, (_, path) in self._places.items()}
        self._offsets = {rank: path.stat().st_size for rank, path in logs.items() if path.exists()}
        self._said: set[str] = set()
        self._failed: set[int] = set()

    def poll(self) -> Iterator[LogLine]:
        """What is new, whole lines only."""
        for rank, (host, path) in self._places.items():
            for text in self._new_lines(rank, path):
                if text == _TRACEBACK:
                    self._failed.add(rank)
                if rank not in self._failed and self._matters(rank, text):
                    self._said.add(text)
                    yield LogLine(host, rank, text)

    def _matters(self, rank: int, text: str) -> bool:
        if not text or text in self._said or text.startswith(_HEADER):
            return False
        return rank == 0 or _WARNING.search(text) is not None

    def _new_lines(self, rank: int, path: Path) -> list[str]:
        size = path.stat().st_size if path.exists() else 0
        offset = self._offsets.get(rank, 0) if self._offsets.get(rank, 0) <= size else 0  # 0: written anew
        if size == offset:
            return []
        with path.open("rb") as file:
            file.seek(offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offsets[rank] = offset + len(whole) + len(newline)
        return whole.decode(errors="replace").split("\n") if newline else []
