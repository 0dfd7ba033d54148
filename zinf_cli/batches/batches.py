"""The order of windows, and how a global batch is dealt to ranks and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from zinf_cli.engine.ranks import Ranks
from zinf_cli.errors import DatasetError

Item = TypeVar("Item")


class BatchOrder:
    """The windows that each step takes. Each epoch is a permutation from (seed, epoch); epochs follow without gaps."""

    def __init__(self, num_windows: int, sequences_per_step: int, seed: int, shuffle: bool) -> None:
        if num_windows < sequences_per_step:
            raise DatasetError(
                f"the text has {num_windows} windows, fewer than the {sequences_per_step} of one batch",
                hint="give more text, or lower train.seq_len or the global batch",
            )
        self._num_windows = num_windows
        self._sequences = sequences_per_step
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._permutation: np.ndarray[tuple[int], np.dtype[np.int64]] = np.arange(0)
        self._start = (0, 0)

    def start_at(self, step: int, sequences: int) -> None:
        """Go on after `step` steps that took `sequences`. Their batches may have had another size."""
        self._start = (step, sequences)

    def sequences_before(self, step: int) -> int:
        """The number of sequences that the steps before `step` take."""
        first, sequences = self._start
        return sequences + (step - first) * self._sequences

    def windows(self, step: int) -> tuple[int, ...]:
        """The window numbers of `step` (from 0), in order."""
        first = self.sequences_before(step)
        return tuple(self._window(place) for place in range(first, first + self._sequences))

    def steps_for(self, epochs: float) -> int:
        """The number of steps after which every window has been seen `epochs` times."""
        step, sequences = self._start
        return step + math.ceil(max(0.0, epochs * self._num_windows - sequences) / self._sequences)

    def _window(self, place: int) -> int:
        epoch, inside = divmod(place, self._num_windows)
        if not self._shuffle:
            return inside
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._epoch, self._permutation = epoch, generator.permutation(self._num_windows)
        return int(self._permutation[inside])


def deal(windows: Sequence[Item], rank: int, world_size: int, micro_batch_size: int) -> list[tuple[Item, ...]]:
    """This rank's micro-batches of a global batch.

    Ranks get contiguous shares that differ by at most one window. Each share is dealt to the same number of
    micro-batches, of at most `micro_batch_size`; those of a smaller share may be empty. All shares together are
    `windows`.
    """
    first, last = _share(len(windows), rank, world_size)
    mine = tuple(windows[first:last])
    largest_share = math.ceil(len(windows) / world_size)
    count = math.ceil(largest_share / micro_batch_size)
    if len(mine) == count * micro_batch_size:
        sizes = [micro_batch_size] * count
    else:
        sizes = [b - a for a, b in (_share(len(mine), number, count) for number in range(count))]
    dealt = []
    start = 0
    for size in sizes:
        dealt.append(mine[start : start + size])
        start += size
    return dealt


def deal_whole(windows: Sequence[Item], rank: int, world_size: int, micro_batch_size: int) -> list[tuple[Item, ...]]:
    """This rank's micro-batches, if it matters which windows are in one together: they are the same on any ranks.

    Each has `micro_batch_size` windows, in their order; the last one of all has what is left. Every rank gets as many;
    those that it has less than others are empty.
    """
    firsts = range(0, len(windows), micro_batch_size)
    whole = [tuple(windows[first : first + micro_batch_size]) for first in firsts]
    return [share[0] if share else () for share in deal(whole, rank, world_size, 1)]


def in_turn(items: Sequence[Item], ranks: Ranks) -> tuple[list[Item], list[Item]]:
    """(this rank's of `items`, the same with the first of all items behind them): of the latter, ranks have as many."""
    mine = list(items[ranks.rank :: ranks.world_size])
    most = math.ceil(len(items) / ranks.world_size)
    return mine, mine + [items[0]] * (most - len(mine))


def _share(count: int, number: int, of: int) -> tuple[int, int]:
    """Bounds of part `number` if `count` things are cut into `of` parts, the larger parts first."""
    size, more = divmod(count, of)
    first = number * size + min(number, more)
    return first, first + size + (1 if number < more else 0)
