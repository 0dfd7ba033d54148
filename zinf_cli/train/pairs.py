"""Pairs of a source and its target, for encoder-decoders: what one reads and what it is to write.

They lie in a token stream one behind the other, source before target, with a loss on the targets alone; so a pair
begins where the mask falls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from zinf_cli.train.token_stream import MASKED, TokenStream

_BLOCK = 1 << 24
"""Tokens whose mask is looked at together."""


@dataclass(frozen=True)
class PairStream:
    """A row of a text is a sequence; nothing is packed. `pad` is the token that fills a source up."""

    stream: TokenStream
    pad: int

    def __len__(self) -> int:
        return len(self.stream)

    @property
    def max_token(self) -> int:
        return self.stream.max_token

    @property
    def fingerprint(self) -> str:
        return self.stream.fingerprint

    def num_windows(self, seq_len: int) -> int:
        """Pairs: sources and targets that are longer than `seq_len` are cut."""
        return len(self._edges) // 2

    def num_cut(self, seq_len: int) -> int:
        """Pairs of which a part is longer than `seq_len`."""
        lengths = np.diff(self._edges, append=len(self)).reshape(-1, 2)
        return int((lengths > seq_len).any(axis=1).sum())

    def window(self, index: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, labels, attention_mask) of pair `index`, each int64 [seq_len]: filled up where it is shorter.

        What is cut keeps its last token, by which a tokenizer says that it ends.
        """
        edges = self._edges
        start, middle = int(edges[2 * index]), int(edges[2 * index + 1])
        stop = int(edges[2 * index + 2]) if 2 * index + 2 < len(edges) else len(self)
        source, target = (self._part(*bounds, seq_len) for bounds in ((start, middle), (middle, stop)))
        input_ids = torch.full((seq_len,), self.pad)
        attention, labels = torch.zeros_like(input_ids), torch.full((seq_len,), MASKED)
        input_ids[: len(source)], attention[: len(source)], labels[: len(target)] = source, 1, target
        return input_ids, labels, attention

    def split(self, fraction: float) -> tuple[PairStream, PairStream]:
        """(training, held out): the last `fraction` of the pairs is held out."""
        pairs = len(self._edges) // 2
        kept = pairs - int(pairs * fraction)
        boundary = int(self._edges[2 * kept]) if kept < pairs else len(self)
        parts = self.stream.part(0, boundary), self.stream.part(boundary, len(self))
        return PairStream(parts[0], self.pad), PairStream(parts[1], self.pad)

    def _part(self, start: int, stop: int, seq_len: int) -> torch.Tensor:
        tokens = self.stream.tokens[start:stop].astype(np.int64)
        if len(tokens) > seq_len:
            tokens = np.append(tokens[: seq_len - 1], tokens[-1])
        return torch.from_numpy(tokens)

    @cached_property
    def _edges(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where sources and targets begin, in turn."""
        mask = self.stream.loss_mask
        assert mask is not None
        edges = [np.zeros(min(1, len(mask)), dtype=np.int64)]
        for start in range(0, len(mask), _BLOCK):
            block = mask[start : start + _BLOCK + 1]
            edges.append(np.flatnonzero(block[1:] != block[:-1]) + start + 1)
        return np.concatenate(edges)
