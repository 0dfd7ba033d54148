"""Rows of texts that are compared, and the loss that brings a query's embedding near that of its own text.

A row is a query, the text that it belongs with (its positive), and so many that it does not belong with (negatives).
The loss is InfoNCE (van den Oord et al., arXiv 1807.03748), as in sentence-transformers' MultipleNegativesRankingLoss:
of a query's cosines with all texts of its micro-batch, divided by a temperature, cross-entropy with its positive as the
label. So rows of a micro-batch are each other's negatives. Those of other micro-batches are not, on any rank: the loss
of a micro-batch follows from its own rows, however many pass the model together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from zinf_cli.batches.rows import Rows, padded
from zinf_cli.models.pooling import Pooling, pooled


@dataclass(frozen=True)
class ComparedStream(Rows):
    """A stream of rows, each a window of several sequences; nothing is packed."""

    texts_of_a_row: int
    pad: int
    """The token that pads a text."""
    tail: int
    """How many special tokens its tokenizer puts behind it: a text that is cut keeps them."""

    def num_windows(self, seq_len: int) -> int:
        """The number of rows. A text that is longer than `seq_len` is cut."""
        return len(self.starts) - 1

    def lines(self, seq_len: int) -> Iterator[str]:
        if cut := int((np.diff(self._bounds) > seq_len).sum()):
            yield f"{cut} texts are longer than train.seq_len={seq_len} and are cut there"

    def window(self, index: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, label, attention_mask) of row `index`: its texts, int64 [texts_of_a_row, seq_len], and a mask.

        The label is 0 (int64, a scalar): of the texts behind the query, its positive is the first.
        """
        bounds = self._bounds[index * self.texts_of_a_row :][: self.texts_of_a_row + 1]
        texts = (self.stream.tokens[int(start) : int(stop)] for start, stop in pairwise(bounds))
        rows = [padded(tokens, seq_len, self.pad, self.tail) for tokens in texts]
        input_ids, attention = (torch.stack(column) for column in zip(*rows, strict=True))
        return input_ids, torch.tensor(0), attention

    @cached_property
    def starts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self._bounds[:: self.texts_of_a_row]

    @cached_property
    def _bounds(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where texts begin, and the end of the last one. A part of a text may end inside of a row."""
        assert self.stream.ends is not None
        whole = len(self.stream.ends) // self.texts_of_a_row * self.texts_of_a_row
        return np.concatenate((np.zeros(1, dtype=np.int64), self.stream.ends[:whole]))


def together(rows: torch.Tensor) -> torch.Tensor:
    """[rows, texts_of_a_row, length] as [texts, length]: all queries, then all positives, then all first negatives."""
    return rows.transpose(0, 1).flatten(0, 1)


def comparison_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor,
    pooling: Pooling,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the mean loss, fp32 [rows, texts but for queries]: cosines by temperature).

    `input_ids` and `attention_mask` are int64 [texts, seq_len], in the order of `together`; `labels` (int64 [rows]) are
    the numbers of the queries' own texts.
    """
    hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    embeddings = F.normalize(pooled(hidden, attention_mask, pooling), dim=-1)
    queries, texts = embeddings[: len(labels)], embeddings[len(labels) :]
    scores = queries @ texts.T * (1 / temperature)
    return F.cross_entropy(scores, labels), scores
