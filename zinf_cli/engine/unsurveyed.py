"""What a model keeps for backward that can't be tried without data: a guess from its shapes, and a generous one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from zinf_cli.engine.survey import Survey, UnitUse
from zinf_cli.engine.units import UnitLayout
from zinf_cli.model_state import round_up

PER_PRODUCT = 4
"""Tensors as large as a product's result that autograd saves: what activations, gates and scans make of it."""
EXPERTS_PER_TOKEN = 8
NORMS = 8
"""Tensors as wide as the hidden state that norms, residuals and rotations leave, and that a unit takes and gives."""
SCORES = 3
"""Of attention, where it is not fused: products, softmax, dropout."""


def guessed(
    model: nn.Module, units: Sequence[UnitLayout], order: Sequence[int], sequences: int, seq_len: int
) -> Survey:
    """A survey that was not made, of one micro-batch. Tensors count as fp32, parameters as matrices of a product."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    tokens = sequences * seq_len
    hidden = getattr(text, "hidden_size", 0) or _widest(units)
    heads = getattr(text, "num_attention_heads", 0) or 0
    state = round_up(tokens * hidden * 4)
    scores = SCORES * sequences * heads * seq_len * seq_len * 4
    uses = {}
    for number, unit in enumerate(units):
        widths = sum(_widths(unit))
        saved = PER_PRODUCT * tokens * widths * 4 + NORMS * state + (scores if not unit.resident else 0)
        widest = max((param.shape[0] for param in unit.params() if len(param.shape) == 2), default=0)
        uses[number] = UnitUse(4 * state, 4 * state, saved, 2 * state + tokens * widest * 4)
    vocabulary = getattr(text, "vocab_size", 0)
    loss = SCORES * tokens * vocabulary * 4
    return Survey(tuple(units), tuple(order), uses, NORMS * state, loss, complete=False)


def _widths(unit: UnitLayout) -> Iterator[int]:
    """Numbers per token that a product with each of the unit's parameters takes and makes."""
    for param in unit.params():
        if len(param.shape) >= 2:
            times = EXPERTS_PER_TOKEN if len(param.shape) > 2 else 1
            yield times * (param.shape[-1] + param.shape[-2])


def _widest(units: Sequence[UnitLayout]) -> int:
    return max((min(param.shape[-2:]) for unit in units for param in unit.params() if len(param.shape) >= 2), default=1)
