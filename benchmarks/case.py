"""What is trained in the benchmarks: llamas of some sizes, some shapes of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LLAMA = {"model_type": "llama", "max_position_embeddings": 8192}
NEVER_CLIPS = 1e4
MODELS: dict[str, dict[str, Any]] = {
    "2M": {
        **_LLAMA, "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    "216M": {
        **_LLAMA, "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2688, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False,
    },
    "3 times the layers": {
        **_LLAMA, "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2688, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False,
    },
    "1B": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "3B": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "8B": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A step of `micro_batches` micro-batches of one sequence of `tokens`."""

    micro_batches: int
    tokens: int
    model: str = "216M"
    checkpointing: bool = True
    """Whether activations are recomputed."""
    clip: float | None = 1.0
    """Largest gradient norm: 1 clips every step of this training, NEVER_CLIPS none. None: zinf updates in backward."""
    precision: str = "auto"
    """Of the compute: fp32, or bf16 with fp32 masters. auto: bf16 on an accelerator, fp32 on a CPU."""
    state_dtype: str = "fp32"
    """Of zinf's moments."""

    @property
    def config(self) -> dict[str, Any]:
        return MODELS[self.model]

    @property
    def num_params(self) -> int:
        c = {key: value for key, value in self.config.items() if isinstance(value, int)}
        hidden = c["hidden_size"]
        keys_and_values = 2 * hidden * hidden * c["num_key_value_heads"] // c["num_attention_heads"]
        layer = 2 * hidden * hidden + keys_and_values + 3 * hidden * c["intermediate_size"] + 2 * hidden
        tables = (1 if c["tie_word_embeddings"] else 2) * c["vocab_size"] * hidden
        return c["num_hidden_layers"] * layer + tables + hidden

    @property
    def activation_numel(self) -> int:
        """Elements that pass from block to block in one micro-batch: what a recompute starts from."""
        return int(self.config["num_hidden_layers"] * self.tokens * self.config["hidden_size"])

    @property
    def flops_per_token(self) -> float:
        """6 for each weight that multiplies a token, and what causal attention computes. A recompute does not count."""
        c = self.config
        looked_up = 0 if c["tie_word_embeddings"] else c["vocab_size"] * c["hidden_size"]
        norms = (2 * c["num_hidden_layers"] + 1) * c["hidden_size"]
        attention = c["num_hidden_layers"] * c["hidden_size"] * self.tokens
        return 6.0 * float(self.num_params - looked_up - norms + attention)

    def __str__(self) -> str:
        return (
            f"{self.micro_batches}×{self.tokens}"
            + ("" if self.checkpointing else ", no recompute")
            + {None: ", no clipping", NEVER_CLIPS: ", norm never clips"}.get(self.clip, "")
            + ("" if self.model == "216M" else f", {self.model}")
            + ("" if self.precision == "auto" else f", {self.precision}")
            + ("" if self.state_dtype == "fp32" else f", moments in {self.state_dtype}")
        )
