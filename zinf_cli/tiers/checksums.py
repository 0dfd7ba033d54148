"""Keeps checksums of what a drive holds: they are taken at every write and compared at every read.

A drive, its link or its memory may flip a bit without an error, and training would go on with it. So the thread that
writes a block keeps its xxh3 in memory. The thread that reads the block compares before anybody computes with it.

Reads may be cut in other places than writes: parameters are written by the chunk and read whole, gradients the other
way round. So a checksum is of a span, and spans end at every multiple of a piece in an extent, where chunks end, too. A
span is compared if a read has all of it. The engine never reads a part of a span.
"""

from __future__ import annotations

import threading

from zinf_cli.checksum import checksum
from zinf_cli.model_state import PIECE


class Checksums:
    """The checksums of one extent: for the first byte of each span, its end and its checksum. Spans are disjoint."""

    __slots__ = ("_lock", "_spans", "piece")

    def __init__(self, piece: int = PIECE) -> None:
        self.piece = piece
        """Bytes of a piece."""
        self._spans: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def note(self, begin: int, content: memoryview) -> list[tuple[int, int, int]]:
        """Keep the checksums of `content`, which is about to be written from byte `begin` of the extent on.

        They replace those of the bytes that it overwrites. Returns (first byte, end, checksum) of each span.
        """
        end, piece = begin + len(content), self.piece
        spans = []
        for first in (begin, *range(begin // piece * piece + piece, end, piece)):
            last = min(first // piece * piece + piece, end)
            spans.append((first, last, checksum(content[first - begin : last - begin])))
            self._replace(*spans[-1])
        return spans

    def _replace(self, begin: int, end: int, value: int) -> None:
        with self._lock:
            if self._spans.get(begin, (None, 0))[0] != end:
                for first, (last, _) in list(self._spans.items()):
                    if first < end and begin < last:
                        del self._spans[first]
            self._spans[begin] = end, value

    def agree(self, begin: int, content: memoryview) -> bool:
        """Whether `content`, read from byte `begin` on, is what was written there. Spans that it holds whole count."""
        end = begin + len(content)
        with self._lock:
            exact = self._spans.get(begin)
            if exact is not None and exact[0] == end:
                whole = [(begin, *exact)]
            else:
                whole = [(first, *span) for first, span in self._spans.items() if begin <= first and span[0] <= end]
        return all(checksum(content[first - begin : last - begin]) == value for first, last, value in whole)
