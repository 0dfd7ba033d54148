"""Rows of a text that are each a sequence of their own, or a few: pairs, preferences, texts with labels or pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from zinf_cli.text.token_stream import TokenStream

R = TypeVar("R", bound="Rows")


@dataclass(frozen=True)
class Rows(ABC):
    """The rows of a token stream; nothing is packed."""

    stream: TokenStream

    def __len__(self) -> int:
        return len(self.stream)

    @property
    def max_token(self) -> int:
        return self.stream.max_token

    @property
    def fingerprint(self) -> str:
        return self.stream.fingerprint

    @cached_property
    def starts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """int64 [rows + 1]: where rows begin in the stream, and where the last one ends. A row is a document."""
        assert self.stream.ends is not None
        return np.concatenate((np.zeros(1, dtype=np.int64), self.stream.ends))

    @abstractmethod
    def lines(self, seq_len: int) -> Iterator[str]:
        """What is cut or left out, in words."""

    def split(self: R, fraction: float) -> tuple[R, R]:
        """(training, held out): the last `fraction` of the rows is held out."""
        rows = len(self.starts) - 1
        boundary = int(self.starts[rows - int(rows * fraction)])
        first, last = self.stream.part(0, boundary), self.stream.part(boundary, len(self))
        return replace(self, stream=first), replace(self, stream=last)


def padded(tokens: np.ndarray[Any, Any], seq_len: int, pad: int, tail: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of a text, int64 [seq_len]: `shortened`, or padded, where the mask is 0."""
    tokens = shortened(tokens, seq_len, tail)
    input_ids, attention = torch.full((seq_len,), pad), torch.zeros(seq_len, dtype=torch.int64)
    input_ids[: len(tokens)], attention[: len(tokens)] = torch.from_numpy(tokens), 1
    return input_ids, attention


def shortened(tokens: np.ndarray[Any, Any], seq_len: int, tail: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The tokens of a text, int64, `seq_len` at most. The last `tail`, which a tokenizer puts behind each, stay."""
    tokens = tokens.astype(np.int64)
    if len(tokens) <= seq_len:
        return tokens
    tail = min(tail, seq_len)
    return np.concatenate((tokens[: seq_len - tail], tokens[len(tokens) - tail :]))
