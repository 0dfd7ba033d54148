"""Several texts in one run, each with its share of the sequences.

Which text a sequence is from follows from its place in the run alone: multiples of the golden ratio, modulo 1, fall
into each share as evenly as can be (Weyl's sequence). So every step has the shares, within a sequence or two, and a
resume finds its place by arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from zinf_cli.batches.batches import BatchOrder
from zinf_cli.batches.compared import ComparedStream
from zinf_cli.batches.labelled import LabelledStream
from zinf_cli.batches.packing import PackedStream
from zinf_cli.batches.pairs import PairStream
from zinf_cli.batches.pictured import PicturedStream
from zinf_cli.batches.preferences import PreferenceStream
from zinf_cli.text.token_stream import TokenStream, digest

Part = TokenStream | PackedStream | PairStream | PreferenceStream | LabelledStream | PicturedStream | ComparedStream
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""The golden ratio's fraction, of 2**64."""
_LARGEST = 2.0**64 - 2**11
"""The largest number below 2**64. A share too small for a float would begin at 2**64 itself."""
_BLOCK = 1 << 20
"""Places that are counted at once."""


@dataclass(frozen=True)
class MixedStream:
    """Texts of one kind side by side: the windows of the first, then those of the second, and so on."""

    parts: tuple[Part, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def max_token(self) -> int:
        return max(part.max_token for part in self.parts)

    @property
    def fingerprint(self) -> str:
        return digest(" ".join(f"{part.fingerprint} {w}" for part, w in zip(self.parts, self.weights, strict=True)))

    def num_windows(self, seq_len: int) -> int:
        return sum(part.num_windows(seq_len) for part in self.parts)

    def at(self, index: int, seq_len: int) -> tuple[Part, int]:
        """The text that window `index` is from, and its number there."""
        for part in self.parts:
            count = part.num_windows(seq_len)
            if index < count:
                return part, index
            index -= count
        raise IndexError(index)


class MixedOrder(BatchOrder):
    """The windows that each step takes of several texts. Each text has epochs of its own.

    A pass over all is as many sequences as the texts have windows together.
    """

    def __init__(
        self, num_windows: Sequence[int], weights: Sequence[float], sequences_per_step: int, seed: int, shuffle: bool
    ) -> None:
        super().__init__(sum(num_windows), sequences_per_step, seed, shuffle)
        self._orders = [BatchOrder(count, min(1, count), seed, shuffle) for count in num_windows]
        self._firsts = [0, *accumulate(num_windows)]
        bounds = np.cumsum(weights)[:-1] / sum(weights)
        self._bounds = np.minimum(bounds * 2.0**64, _LARGEST).astype(np.uint64)
        self._phase = np.random.Generator(np.random.PCG64([seed])).integers(2**64, dtype=np.uint64)
        self._counted = (0, np.zeros(len(num_windows), dtype=np.int64))

    def sources(self, step: int) -> list[int]:
        """How many sequences of `step` are from each text."""
        first = self.sequences_before(step)
        before = self._before(first)
        return [int(count) for count in self._before(first + self._sequences) - before]

    def _window(self, place: int) -> int:
        before = self._before(place)
        source = int(self._sources(place, place + 1)[0])
        return self._firsts[source] + self._orders[source]._window(int(before[source]))

    def _sources(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The texts of the sequences at places `start` to before `stop`, by number."""
        return np.searchsorted(self._bounds, self._phase + np.arange(start, stop, dtype=np.uint64) * _GOLDEN, "right")

    def _before(self, place: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """int64 [texts]: how many of the sequences before `place` are from each."""
        start, counts = self._counted
        if place < start:
            start, counts = 0, np.zeros_like(counts)
        for first in range(start, place, _BLOCK):
            found = self._sources(first, min(place, first + _BLOCK))
            counts = counts + np.bincount(found, minlength=len(counts))
        self._counted = (place, counts)
        return counts
