"""Masked language modelling: which tokens of a sequence are hidden, and behind what (BERT, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zinf_cli.train.token_stream import MASKED

CHOSEN = 0.15
"""Of the tokens that are not special: these are predicted."""
HIDDEN, RANDOM = 0.8, 0.1
"""Of the chosen: behind the mask token, or behind any other one; the rest is left to be seen."""


@dataclass(frozen=True)
class Masking:
    """Draws as transformers' DataCollatorForLanguageModeling does, but from (seed, place of the sequence in the run):
    a sequence is masked in the same way on whatever rank, in whatever micro-batch, after a resume."""

    mask_token: int
    special: np.ndarray[Any, np.dtype[np.int64]]
    """Tokens that are never chosen."""
    num_tokens: int
    """A random token is below this."""
    seed: int

    def apply(self, input_ids: torch.Tensor, labels: torch.Tensor, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels) with some hidden, and labels for these alone; all int64 [seq_len]."""
        draw = np.random.Generator(np.random.PCG64([self.seed, place, 1]))
        ids = input_ids.numpy()
        chosen = (draw.random(ids.shape) < CHOSEN) & ~np.isin(ids, self.special) & (labels.numpy() != MASKED)
        way, other = draw.random(ids.shape), draw.integers(self.num_tokens, size=ids.shape)
        hidden = np.where(way < HIDDEN, self.mask_token, np.where(way < HIDDEN + RANDOM, other, ids))
        return torch.from_numpy(np.where(chosen, hidden, ids)), torch.from_numpy(np.where(chosen, ids, MASKED))
