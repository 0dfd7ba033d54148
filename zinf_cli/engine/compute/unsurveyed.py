"""Guesses what a model keeps for backward, if no survey has come to its end: a generous guess, from its shapes.

For such a model every weight counts as one that the forward may write to. The run then copies each unit for its call,
and a write that would be lost is an error (constant_weights.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from zinf_cli.engine.compute.survey import Survey, UnitUse
from zinf_cli.engine.units.units import UnitLayout
from zinf_cli.model_state import round_up

PER_PRODUCT = 4
"""Tensors that autograd saves for each product, as large as its inputs and result: of activations, gates and scans."""
EXPERTS_PER_TOKEN = 8
NORMS = 8
"""Tensors that autograd saves for a unit, as wide as the hidden state: of norms, residuals, rotations, in and out."""
SCORES = 3
"""Tensors that autograd saves as large as the scores of attention that is not fused: products, softmax, dropout."""


def guessed(model: nn.Module, seen: Survey, sequences: int, seq_len: int) -> Survey:
    """`seen` with the sizes it lacks, of one micro-batch. All tensors count as fp32, parameters as matrices."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    tokens = sequences * seq_len
    hidden = getattr(text, "hidden_size", 0) or _widest(seen.units)
    heads = getattr(text, "num_attention_heads", 0) or 0
    state = round_up(tokens * hidden * 4)
    scores = SCORES * sequences * heads * seq_len * seq_len * 4
    uses = {}
    for number, unit in enumerate(seen.units):
        widths = sum(_widths(unit))
        saved = (
            PER_PRODUCT * tokens * widths * 4 + NORMS * state + (scores if not unit.resident else 0) + unit.num_bytes
        )
        widest = max((param.shape[0] for param in unit.params() if len(param.shape) == 2), default=0)
        uses[number] = UnitUse(4 * state, 4 * state, saved, 2 * state + tokens * widest * 4, taken_bytes=4 * state)
    vocabulary = getattr(text, "vocab_size", 0)
    loss = SCORES * tokens * vocabulary * 4
    glue = NORMS * state + sum(unit.num_bytes for unit in seen.units if unit.resident)
    written = frozenset(place.name for unit in seen.units for place in unit.params() if place.bounds is None)
    return replace(seen, uses=uses, glue_bytes=glue, loss_bytes=loss, live_bytes=glue, written=written)


def _widths(unit: UnitLayout) -> Iterator[int]:
    """For each matrix of the unit: how many values per token its product takes and gives."""
    for param in unit.params():
        if len(param.shape) >= 2:
            times = EXPERTS_PER_TOKEN if len(param.shape) > 2 else 1
            yield times * (param.shape[-1] + param.shape[-2])


def _widest(units: Sequence[UnitLayout]) -> int:
    return max((min(param.shape[-2:]) for unit in units for param in unit.params() if len(param.shape) >= 2), default=1)
