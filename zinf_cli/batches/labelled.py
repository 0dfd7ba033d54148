"""Texts that each have a label, for classifiers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from zinf_cli.batches.pairs import OfStream


@dataclass(frozen=True)
class LabelledStream(OfStream):
    """A stream of texts with a label, each a sequence of its own; nothing is packed."""

    pad: int
    """The token that pads a text."""
    ends_with: frozenset[int]
    """The special tokens by which a tokenizer marks the end: a text that is cut keeps its own."""
    number: bool
    """Whether a label is a number to come close to, and not that of a class."""

    def num_windows(self, seq_len: int) -> int:
        """The number of texts. One that is longer than `seq_len` is cut."""
        return len(self._bounds) - 1

    def num_cut(self, seq_len: int) -> int:
        """The number of texts that are longer than `seq_len`."""
        return int((np.diff(self._bounds) > seq_len).sum())

    def window(self, index: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, label, attention_mask) of text `index`.

        int64 [seq_len], a scalar (int64, or fp32 if it is a number) and int64 [seq_len], 0 where the text is padded.
        """
        assert self.stream.labels is not None
        start, stop = (int(bound) for bound in self._bounds[index : index + 2])
        tokens = self.stream.tokens[start:stop].astype(np.int64)
        if len(tokens) > seq_len:
            last = tokens[-1:] if int(tokens[-1]) in self.ends_with else tokens[:0]
            tokens = np.concatenate((tokens[: seq_len - len(last)], last))
        input_ids, attention = torch.full((seq_len,), self.pad), torch.zeros(seq_len, dtype=torch.int64)
        input_ids[: len(tokens)], attention[: len(tokens)] = torch.from_numpy(tokens), 1
        kind = torch.float32 if self.number else torch.int64
        return input_ids, torch.tensor(float(self.stream.labels[index])).to(kind), attention

    def split(self, fraction: float) -> tuple[LabelledStream, LabelledStream]:
        """(training, held out): the last `fraction` of the texts is held out."""
        texts = len(self._bounds) - 1
        boundary = int(self._bounds[texts - int(texts * fraction)])
        parts = self.stream.part(0, boundary), self.stream.part(boundary, len(self))
        train, held_out = (LabelledStream(part, self.pad, self.ends_with, self.number) for part in parts)
        return train, held_out

    @cached_property
    def _bounds(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where the texts begin, and the end of the last one."""
        assert self.stream.ends is not None
        return np.concatenate((np.zeros(1, dtype=np.int64), self.stream.ends))
