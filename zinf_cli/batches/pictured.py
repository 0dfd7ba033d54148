"""Texts with pictures, each a sequence of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from zinf_cli.batches.rows import Rows
from zinf_cli.text.pictures import Processor
from zinf_cli.text.token_stream import MASKED


@dataclass(frozen=True)
class PicturedStream(Rows):
    """A stream of texts with pictures; nothing is packed.

    A text is left out if it has nothing to learn within `seq_len`, or a picture that does not end there.
    """

    processor: Processor
    seq_len: int
    pad: int
    """The token that pads a text."""

    def num_windows(self, seq_len: int) -> int:
        """The number of texts."""
        assert seq_len == self.seq_len
        return len(self._kept)

    def window(self, index: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(input_ids, labels, attention_mask) of text `index`, each int64 [seq_len], padded if it is shorter."""
        assert seq_len == self.seq_len
        assert self.stream.loss_mask is not None
        start, stop = (int(bound) for bound in self.starts[self._kept[index] :][:2])
        part = slice(start, min(stop, start + seq_len))
        tokens = torch.from_numpy(self.stream.tokens[part].astype(np.int64))
        input_ids = torch.full((seq_len,), self.pad)
        labels, attention = torch.full((seq_len,), MASKED), torch.zeros(seq_len, dtype=torch.int64)
        input_ids[: len(tokens)], attention[: len(tokens)] = tokens, 1
        labels[: len(tokens)] = tokens.masked_fill(torch.from_numpy(~self.stream.loss_mask[part]), MASKED)
        return input_ids, labels, attention

    def pictures(self, index: int) -> list[str]:
        """The paths of the pictures of text `index`."""
        assert self.stream.pictures is not None
        return [picture.path for picture in self.stream.pictures[self._kept[index]]]

    def lines(self, seq_len: int) -> Iterator[str]:
        lengths = np.diff(self.starts)
        if cut := int((lengths[self._kept] > self.seq_len).sum()):
            yield f"{cut} texts are longer than train.seq_len={self.seq_len} and are cut there"
        if left_out := len(lengths) - len(self._kept):
            yield f"left out: {left_out} texts, with nothing to learn or half a picture in train.seq_len={self.seq_len}"

    @property
    def seen(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """int64 [texts]: how many tokens of each stand for what the model sees of pictures."""
        return self._judged[1]

    @property
    def _kept(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The texts that are trained on."""
        return self._judged[0]

    @cached_property
    def _judged(self) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
        mask, tokens = self.stream.loss_mask, self.stream.tokens
        assert mask is not None
        stand_ins = self.processor.stand_ins
        kept, seen = [], []
        for number, (start, stop) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            end = min(int(stop), int(start) + self.seq_len)
            stands_in = np.isin(tokens[start:stop], stand_ins)
            if not stands_in[end - start :].any() and mask[start + 1 : end].any():  # nothing predicts the first token
                kept.append(number)
                seen.append(int(stands_in.sum()))
        return np.array(kept, dtype=np.int64), np.array(seen, dtype=np.int64)
