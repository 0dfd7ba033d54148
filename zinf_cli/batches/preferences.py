"""Preferences: pairs of a chosen and a rejected answer to one prompt, and the loss that learns from them.

Direct preference optimization (Rafailov et al., arXiv 2305.18290). Let r be how much likelier the chosen answer is than
the rejected one: the difference of their summed log-probabilities. With r₀ of the model as the run began, the loss of a
pair is -log σ(β (r - r₀)). The answers lie in a token stream one after another, the chosen one first, each behind its
prompt; the loss mask is that of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from zinf_cli.batches.rows import Rows
from zinf_cli.text.token_stream import MASKED

PAD = 0
"""The token behind an answer. Any will do: no other token sees it, and it has no loss."""


@dataclass(frozen=True)
class PreferenceStream(Rows):
    """A stream of pairs, each a window of two sequences. A pair is left out if an answer begins behind `seq_len`."""

    seq_len: int

    def num_windows(self, seq_len: int) -> int:
        """The number of pairs."""
        assert seq_len == self.seq_len
        return len(self._kept)

    def num_real(self, index: int) -> int:
        """The tokens of pair `index` that are no padding."""
        lengths = np.diff(self._bounds[2 * self._kept[index] :][:3])
        return int(np.minimum(lengths, self.seq_len).sum())

    def window(self, index: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels) of pair `index`, each int64 [2, seq_len]: the chosen answer, then the rejected one."""
        assert seq_len == self.seq_len
        mask = self.stream.loss_mask
        assert mask is not None
        input_ids, labels = torch.full((2, seq_len), PAD), torch.full((2, seq_len), MASKED)
        for row in (0, 1):
            start, stop = (int(bound) for bound in self._bounds[2 * self._kept[index] + row :][:2])
            part = slice(start, min(stop, start + seq_len))
            tokens = torch.from_numpy(self.stream.tokens[part].astype(np.int64))
            input_ids[row, : len(tokens)] = tokens
            labels[row, : len(tokens)] = tokens.masked_fill(torch.from_numpy(~mask[part]), MASKED)
        return input_ids, labels

    def lines(self, seq_len: int) -> Iterator[str]:
        lengths = np.diff(self._bounds).reshape(-1, 2)
        cut = int((lengths[self._kept] > self.seq_len).any(axis=1).sum())
        if cut:
            yield f"{cut} pairs are longer than train.seq_len={self.seq_len} and are cut there"
        if left_out := len(lengths) - len(self._kept):
            yield f"left out: {left_out} pairs, of which an answer lies behind train.seq_len={self.seq_len}"

    @cached_property
    def starts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self._bounds[::2]

    @cached_property
    def _bounds(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where the sequences begin, and the end of the last one. A part of a text may end between two answers."""
        assert self.stream.ends is not None
        return np.concatenate((np.zeros(1, dtype=np.int64), self.stream.ends[: len(self.stream.ends) // 2 * 2]))

    @cached_property
    def _kept(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The pairs with something of both answers within `seq_len`."""
        mask = self.stream.loss_mask
        assert mask is not None
        starts, stops = self._bounds[:-1], self._bounds[1:]
        places = np.stack((starts, np.minimum(stops, starts + self.seq_len)), axis=1).ravel()
        learns = np.logical_or.reduceat(mask, places[places < len(mask)])[::2]  # of each sequence: up to seq_len
        return np.flatnonzero(learns.reshape(-1, 2).all(axis=1))


def log_ratio(model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """fp32 [pairs]: r of each pair.

    Arguments are int64 [2 * pairs, seq_len]; each chosen answer stands before the rejected one.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    compared = labels[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), compared.flatten(), ignore_index=MASKED, reduction="none")
    of_answers: torch.Tensor = losses.view(compared.shape).sum(1).view(-1, 2)
    return of_answers[:, 1] - of_answers[:, 0]


def preference_loss(
    model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the mean loss, fp32 [pairs]: β (r - r₀)). `reference` is r₀, fp32 [pairs]; the others as of `log_ratio`."""
    margins = beta * (log_ratio(model, input_ids, labels) - reference)
    return -F.logsigmoid(margins).mean(), margins
