"""A gradient that 16 bits hold goes to its tier in 16 bits.

Where one micro-batch computes in 16 bits, so does its backward: the fp32 gradient of a parameter that is used once has
the values of a 16-bit one. Where micro-batches or ranks are added up it has not. Nobody has to know which it is, since
every value is compared before one is changed.
"""

from __future__ import annotations

import torch

from zinf_cli.model_state import BLOCK_NUMEL
from zinf_cli.tiers.streams import streams_of


def narrowed(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` (fp32, 1-D) in `dtype`, in the first half of their memory, if that changes none of them.

    Else, and on an accelerator, where it would wait for the comparison, `values` as they are.
    """
    if dtype not in (torch.bfloat16, torch.float16) or not streams_of(values.device).on_cpu:
        return values
    blocks = values.split(BLOCK_NUMEL)
    if not all(torch.equal(block.to(dtype).float(), block) for block in blocks):
        return values
    narrow = values.view(dtype)[: values.numel()]
    for block, into in zip(blocks, narrow.split(BLOCK_NUMEL), strict=True):
        into.copy_(block.to(dtype))  # lies before all blocks that follow
    return narrow
