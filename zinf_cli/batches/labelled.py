"""Texts that each have a label, for classifiers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from zinf_cli.batches.rows import Rows, padded


@dataclass(frozen=True)
class LabelledStream(Rows):
    """A stream of texts with a label, each a sequence of its own; nothing is packed."""

    pad: int
    """The token that pads a text."""
    tail: int
    """How many special tokens its tokenizer puts behind it: a text that is cut keeps them."""
    number: bool
    """Whether a label is a number to come close to, and not that of a class."""

    def num_windows(self, seq_len: int) -> int:
        """The number of texts. One that is longer than `seq_len` is cut."""
        return len(self.starts) - 1

    def lines(self, seq_len: int) -> Iterator[str]:
        if cut := int((np.diff(self.starts) > seq_len).sum()):
            yield f"{cut} texts are longer than train.seq_len={seq_len} and are cut there"

    def window(self, index: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, label, attention_mask) of text `index`.

        int64 [seq_len], a scalar (int64, or fp32 if it is a number) and int64 [seq_len], 0 where the text is padded.
        """
        assert self.stream.labels is not None
        start, stop = (int(bound) for bound in self.starts[index : index + 2])
        input_ids, attention = padded(self.stream.tokens[start:stop], seq_len, self.pad, self.tail)
        kind = torch.float32 if self.number else torch.int64
        return input_ids, torch.tensor(float(self.stream.labels[index])).to(kind), attention
