"""What is trained in the benchmarks: one llama, some shapes of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LLAMA_216M: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2688,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Case:
    """A step of `micro_batches` micro-batches of one sequence of `tokens`."""

    micro_batches: int
    tokens: int
    layers: int = 16
    checkpointing: bool = True
    """Whether activations are recomputed."""
    clip: bool = True
    """Whether the global gradient norm is clipped; without, zinf updates in the backward pass."""

    @property
    def config(self) -> dict[str, Any]:
        return {**LLAMA_216M, "num_hidden_layers": self.layers}

    @property
    def num_params(self) -> int:
        hidden, intermediate, vocabulary = (
            int(LLAMA_216M[key]) for key in ("hidden_size", "intermediate_size", "vocab_size")
        )
        layer = 4 * hidden * hidden + 3 * hidden * intermediate + 2 * hidden
        return self.layers * layer + 2 * vocabulary * hidden + hidden

    def __str__(self) -> str:
        return (
            f"{self.micro_batches}×{self.tokens}"
            + ("" if self.checkpointing else ", no recompute")
            + ("" if self.clip else ", no clipping")
        )
