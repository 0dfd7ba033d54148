"""Pairs of a source and its target, for encoder-decoders: what a model reads and what it has to write.

They lie in a token stream one after another, each source before its target. Only targets have a loss, so a pair begins
where the loss mask ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from zinf_cli.batches.rows import Rows, shortened
from zinf_cli.text.token_stream import MASKED

_BLOCK = 1 << 24
"""How many tokens of the mask are read at once."""


@dataclass(frozen=True)
class PairStream(Rows):
    """A stream of pairs, each a sequence of its own; nothing is packed."""

    pad: int
    """The token that pads a source."""
    tails: tuple[int, int]
    """How many special tokens its tokenizer puts behind a source, and behind a target: one that is cut keeps them."""

    def num_windows(self, seq_len: int) -> int:
        """The number of pairs. A source or target that is longer than `seq_len` is cut."""
        return len(self._edges) // 2

    def lines(self, seq_len: int) -> Iterator[str]:
        lengths = np.diff(self._edges, append=len(self)).reshape(-1, 2)
        if cut := int((lengths > seq_len).any(axis=1).sum()):
            yield f"{cut} pairs are longer than train.seq_len={seq_len} and are cut there"

    def window(self, index: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, labels, attention_mask) of pair `index`, each int64 [seq_len], padded if it is shorter."""
        start, middle, stop = (int(edge) for edge in np.append(self._edges[2 * index :][:3], len(self))[:3])
        parts = (self.stream.tokens[start:middle], self.stream.tokens[middle:stop])
        source, target = (
            torch.from_numpy(shortened(part, seq_len, tail)) for part, tail in zip(parts, self.tails, strict=True)
        )
        input_ids = torch.full((seq_len,), self.pad)
        attention, labels = torch.zeros_like(input_ids), torch.full((seq_len,), MASKED)
        input_ids[: len(source)], attention[: len(source)], labels[: len(target)] = source, 1, target
        return input_ids, labels, attention

    @cached_property
    def starts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.append(self._edges[::2], len(self))

    @cached_property
    def _edges(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The places where sources and targets begin, in turn."""
        mask = self.stream.loss_mask
        assert mask is not None
        edges = [np.zeros(min(1, len(mask)), dtype=np.int64)]
        for start in range(0, len(mask), _BLOCK):
            block = mask[start : start + _BLOCK + 1]
            edges.append(np.flatnonzero(block[1:] != block[:-1]) + start + 1)
        return np.concatenate(edges)
