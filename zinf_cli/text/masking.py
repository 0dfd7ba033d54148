"""Masked language modelling: chooses the tokens of a sequence to hide, and what to put there (BERT, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zinf_cli.text.token_stream import MASKED

CHOSEN = 0.15
"""The share of tokens that are chosen, among those that are not special. The model predicts these."""
HIDDEN, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens: hidden by the mask token, or replaced by a random token. The rest stay as they are."""


@dataclass(frozen=True)
class Masking:
    """Masks sequences as transformers' DataCollatorForLanguageModeling does, but from (seed, place of the sequence in
    the run). So a sequence is masked in the same way on any rank, in any micro-batch and after a resume."""

    mask_token: int
    special: np.ndarray[Any, np.dtype[np.int64]]
    """Tokens that are never chosen."""
    num_tokens: int
    """Random tokens are below this number."""
    seed: int

    def apply(self, input_ids: torch.Tensor, labels: torch.Tensor, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels), int64 [seq_len]: with some tokens masked, and labels only for the chosen ones."""
        draw = np.random.Generator(np.random.PCG64([self.seed, place, 1]))
        ids = input_ids.numpy()
        chosen = (draw.random(ids.shape) < CHOSEN) & ~np.isin(ids, self.special) & (labels.numpy() != MASKED)
        way, other = draw.random(ids.shape), draw.integers(self.num_tokens, size=ids.shape)
        hidden = np.where(way < HIDDEN, self.mask_token, np.where(way < HIDDEN + RANDOM, other, ids))
        return torch.from_numpy(np.where(chosen, hidden, ids)), torch.from_numpy(np.where(chosen, ids, MASKED))
