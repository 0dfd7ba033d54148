"""Checks that a sequence has no more positions than a model knows.

A lookup behind the end of a table fails in the middle of a run, or reads nonsense. Rotary, relative and recurrent
positions have no end if they are computed and not looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from zinf_cli.errors import ModelError
from zinf_cli.models.headers import is_of_text, is_table


def check_seq_len(model: nn.Module, seq_len: int) -> None:
    """ModelError if a sequence of `seq_len` tokens is longer than a table of positions."""
    if (most := most_positions(model)) is not None and most[0] < seq_len:
        limit, name = most
        raise ModelError(
            f"{type(model).__name__} knows {limit} positions ({name}), fewer than the {seq_len} tokens of a sequence",
            where="train.seq_len",
            hint=f"lower train.seq_len to {limit} or less",
        )


def most_positions(model: nn.Module) -> tuple[int, str] | None:
    """(positions, the table's name) of the shortest table of positions. None if the model has none."""
    return min(_limits(model), default=None)


def _limits(model: nn.Module) -> Iterator[tuple[int, str]]:
    """(positions, name) of each table in which the positions of text are looked up."""
    config: Any = model.config
    if config.model_type == "mpt":  # its bias is computed for that many, whatever the input
        yield config.max_seq_len, "max_seq_len"
    known = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if not is_of_text(name):
            continue
        if isinstance(module, nn.Embedding) and is_table(name) and not hasattr(module, "make_weight"):
            rows = module.num_embeddings - _first_row(module)
            yield (min(rows, known) if isinstance(known, int) else rows), name
        for key in ("embed_positions", "pos_encoding"):  # GPT-J's and CTRL's, which are no modules
            table = vars(module).get(key, module._buffers.get(key))
            if isinstance(table, torch.Tensor):
                yield table.shape[0], f"{name}.{key}"


def _first_row(table: nn.Embedding) -> int:
    """The row of the first position. Some tables begin with rows up to that of the padding token."""
    if isinstance(offset := getattr(table, "offset", None), int):
        return offset
    if table.padding_idx is None:
        return 0
    ahead = type(table).__name__ == "ProphetNetPositionalEmbeddings"  # its prediction is one position further
    return table.padding_idx + 1 + ahead
