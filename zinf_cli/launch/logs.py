"""Follows the logs of the ranks for the console: all lines of rank 0, and warnings of every rank.

Tracebacks, and what follows them, are left to the screen that ends a failed run. A rank may write faster than anybody
reads. So there is a limit to what is read, shown and remembered, and now and then a line says how much was left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from zinf_cli.amounts import format_bytes
from zinf_cli.recipe.hosts import Host
from zinf_cli.run_folder.names import rank_log

_WARNING = re.compile(r"warn|error|^note: ", re.IGNORECASE)
_HEADER = "--- rank "
_TRACEBACK = "Traceback (most recent call last):"
_MOST_BYTES = 1 << 20
"""Bytes of all logs that one poll reads. Of a rank that has written more than its share, it reads the end."""
_LEAST_BYTES = 1 << 13
"""The least share of a rank, in bytes."""
_MOST_LOOKS = 512
"""Logs that one poll looks at, beside that of rank 0. With more, each is looked at now and then."""
_MOST_LINES = 40
"""Lines that one poll shows."""
_MOST_SAID = 10_000
"""Lines that are remembered, so that each is shown once."""
_LONGEST = 2000
"""Characters of a line that are shown."""


@dataclass(frozen=True)
class LogLine:
    """A line of the log of `rank`, on `host`."""

    host: str
    rank: int
    text: str


class RankLogs:
    """Follows logs/rank-*.log of a run's folder from now on. A line that several ranks write is given once."""

    def __init__(self, run_dir: Path, hosts: Sequence[Host]) -> None:
        names = [host.name for host in hosts for _ in host.slots]
        self._places = {rank: (name, run_dir / rank_log(rank)) for rank, name in enumerate(names)}
        logs = {rank: path for rank, (_, path) in self._places.items()}
        self._offsets = {rank: size for rank, path in logs.items() if (size := _size(path))}
        self._share = max(_LEAST_BYTES, _MOST_BYTES // max(1, len(names)))
        self._said: dict[str, None] = {}
        self._failed: set[int] = set()
        self._left_out = 0
        self._next = 1
        """The rank whose log the next poll looks at first."""

    def poll(self) -> Iterator[LogLine]:
        """The new lines, as many as the limits allow. A line without its end comes later."""
        shown = 0
        for rank in self._ranks_to_look_at():
            host, path = self._places[rank]
            for text in self._new_lines(rank, path):
                if text == _TRACEBACK:
                    self._failed.add(rank)
                if rank in self._failed or not self._matters(rank, text):
                    continue
                self._remember(text)
                if shown < _MOST_LINES:
                    shown += 1
                    yield LogLine(host, rank, text[:_LONGEST])
                else:
                    self._left_out += len(text) + 1
        if self._left_out and shown < _MOST_LINES:
            note = f"note: {format_bytes(self._left_out)} of the ranks' output are not shown here; logs/ has all of it"
            yield LogLine(self._places[0][0], 0, note)
            self._left_out = 0

    def _ranks_to_look_at(self) -> Iterator[int]:
        """Rank 0, and others in turn."""
        others = len(self._places) - 1
        yield 0
        for number in range(min(others, _MOST_LOOKS)):
            yield 1 + (self._next - 1 + number) % others
        self._next = 1 + (self._next - 1 + _MOST_LOOKS) % max(1, others)

    def _remember(self, text: str) -> None:
        self._said[text] = None
        if len(self._said) > _MOST_SAID:
            del self._said[next(iter(self._said))]

    def _matters(self, rank: int, text: str) -> bool:
        if not text or text in self._said or text.startswith(_HEADER):
            return False
        return rank == 0 or _WARNING.search(text) is not None

    def _new_lines(self, rank: int, path: Path) -> list[str]:
        size = _size(path)
        offset = self._offsets.get(rank, 0) if self._offsets.get(rank, 0) <= size else 0  # 0: written anew
        skipped = max(0, size - offset - self._share)
        if size == offset:
            return []
        try:
            with path.open("rb") as file:
                file.seek(offset + skipped)
                data = file.read(self._share)
        except OSError:
            return []
        whole, newline, rest = data.rpartition(b"\n")
        if len(rest) == self._share:  # no line at all
            whole, newline = rest[:_LONGEST], b"\n"
            self._left_out += len(rest) - _LONGEST if rank == 0 else 0
            self._offsets[rank] = offset + skipped + len(data)
        elif newline:
            self._offsets[rank] = offset + skipped + len(whole) + 1
        if skipped and rank == 0:
            self._left_out += skipped
        return whole.decode(errors="replace").split("\n") if newline else []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
