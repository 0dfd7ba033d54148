"""The block by which the speed of compute is measured: a llama's, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Attention with rotary positions and a gated MLP, each behind an RMSNorm; x is [1, up to `rows`, hidden]."""

    def __init__(self, hidden: int, rows: int, **where: Any) -> None:
        super().__init__()
        inner = hidden * 8 // 3 // 128 * 128
        self.heads = hidden // 64
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, **where) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False, **where) for _ in range(4))
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False, **where) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False, **where)
        self.rotation = torch.randn(2, rows, 64, **where)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](x)
        q, k, v = (self._heads(project(y)) for project in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        out: torch.Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        heads: torch.Tensor = x.unflatten(2, (self.heads, 64)).transpose(1, 2)
        return heads

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.rotation[:, : x.shape[2]]
        rotated: torch.Tensor = x * cos + torch.cat((-second, first), dim=-1) * sin
        return rotated

    def flops(self, rows: int) -> float:
        """Of a forward pass: the matrix products, and causal attention's."""
        weights = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        return 2.0 * rows * weights + 2.0 * rows * rows * self.heads * 64


def pass_over(blocks: Sequence[Block], micro_batches: Sequence[torch.Tensor]) -> None:
    """All micro-batches through each block in turn, as a sweep does: forward, recomputed forward, backward."""
    for block in blocks:
        for x in micro_batches:
            with torch.no_grad():
                block(x)
            block(x).sum().backward()
