"""Makes the tensors that a model's own loss takes from windows of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from zinf_cli.train.masking import Masking
from zinf_cli.train.objective import Objective
from zinf_cli.train.pairs import PairStream
from zinf_cli.train.token_stream import MASKED, TokenStream

Stream = TokenStream | PairStream
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Sample:
    """A window of a text, and its place in the run (or in the held-out text), from which its random numbers follow."""

    window: int
    place: int


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward. An empty micro-batch is the first window without targets."""

    input_ids: torch.Tensor
    """int64 [sequences, seq_len]."""
    labels: torch.Tensor
    """int64 [sequences, seq_len], -100 where there is no loss. Without any target these are the tokens, and the loss
    has weight 0: a mean over nothing would be NaN."""
    num_targets: int
    """Labels that the loss averages over."""
    index: int
    """Its number among the micro-batches of the step, of all ranks."""
    attention_mask: torch.Tensor | None = None
    """int64 [sequences, seq_len], 0 where a source is padded. None if nothing is."""


@dataclass(frozen=True)
class Collator:
    """Makes micro-batches for one model."""

    objective: Objective
    seq_len: int
    masking: Masking | None = None
    """For MASKED_TOKENS."""

    def collate(self, stream: Stream, samples: Sequence[Sample], index: int) -> Batch:
        """The micro-batch of `samples`."""
        rows = [self._row(stream, sample) for sample in samples or (Sample(0, 0),)]
        input_ids, labels, *attention = (torch.stack(column) for column in zip(*rows, strict=True))
        num_targets = self.objective.num_targets(labels) if samples else 0
        if not num_targets and not attention:
            labels = input_ids
        return Batch(input_ids, labels, num_targets, index, *attention)

    def has_targets(self, stream: Stream) -> bool:
        """Whether any window has a label that the loss uses."""
        if isinstance(stream, PairStream) or stream.loss_mask is None:
            return True
        first = 0 if self.objective is Objective.MASKED_TOKENS else 1  # nothing predicts the first token
        windows = stream.num_windows(self.seq_len)
        at_once = max(1, _BLOCK // self.seq_len)
        for start in range(0, windows, at_once):
            stop = min(windows, start + at_once)
            mask = stream.loss_mask[start * self.seq_len : stop * self.seq_len].reshape(-1, self.seq_len)
            if np.any(mask[:, first:]):
                return True
        return False

    def _row(self, stream: Stream, sample: Sample) -> tuple[torch.Tensor, ...]:
        input_ids, labels, *attention = stream.window(sample.window, self.seq_len)
        if self.objective is Objective.NEXT_TOKEN_GIVEN:
            labels = torch.cat((labels[1:], labels.new_full((1,), MASKED)))
        elif self.masking is not None:
            input_ids, labels = self.masking.apply(input_ids, labels, sample.place)
        return input_ids, labels, *attention
