"""What it takes that the same step gives the same bits each time, on an accelerator too.

Some kernels of CUDA add up in whatever order their blocks end: the backward of flash attention over more than a block
of tokens, of embeddings, of index_add. Two runs of one recipe then differ in the last bits, and so do two placements.
torch has kernels that keep an order, which may be slower.
"""

from __future__ import annotations

import os

import torch


def keep_order() -> None:
    """Let torch choose kernels that give the same bits each time, in all threads of this process.

    An operation that has none raises torch's RuntimeError, which names it. To be called before the device is used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS keeps an order only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # zinf reads none
