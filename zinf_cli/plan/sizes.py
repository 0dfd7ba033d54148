"""Closed forms: the bytes and the bandwidth that a transformer needs, from four numbers and no model.

They are sections 3 and 4 of ZeRO-Infinity (arXiv 2104.07857), for mixed precision with Adam. Sizes are in bytes,
bandwidths in bytes per second, rates in FLOP/s. `sequences` is how many a GPU, node or cluster computes at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BYTES_PER_PARAM = {"params": 2, "grads": 2, "optimizer": 16}
"""Section 3: fp16 parameters and gradients; fp32 momentum, variance, parameters and gradients."""
FLOPS_PER_PARAM = 8
"""Per token: 2 in the forward pass, 4 in the backward pass, and 2 for the forward that is recomputed there."""


@dataclass(frozen=True)
class Transformer:
    """A stack of equal blocks, as in sections 3 and 4."""

    layers: int
    hidden: int
    heads: int
    vocab: int = 0
    """Rows of the tied embedding; 0 leaves it out, as the paper does."""
    seq_len: int = 1024
    checkpoint_interval: int = 1
    """Blocks between two activation checkpoints."""

    @property
    def block_params(self) -> int:
        """Section 3: four hidden × hidden matrices of attention and eight of the MLP."""
        return 12 * self.hidden**2

    @property
    def params(self) -> int:
        """Parameters of all blocks, and of the embedding."""
        return self.layers * self.block_params + self.vocab * self.hidden

    @property
    def state_bytes(self) -> int:
        """Section 3: parameters, gradients and optimizer states."""
        return sum(BYTES_PER_PARAM.values()) * self.params

    def checkpoint_bytes(self, sequences: float) -> float:
        """Section 3: the fp16 input of every `checkpoint_interval`-th block."""
        return 2 * sequences * self.seq_len * self.hidden * self.layers / self.checkpoint_interval

    def activation_bytes(self, sequences: float) -> float:
        """Bytes of all activations, with none recomputed."""
        return self.activation_working_bytes(sequences) * self.layers / self.checkpoint_interval

    def activation_working_bytes(self, sequences: float) -> float:
        """Section 3 (AWM): the activations between two checkpoints, which are held while they are recomputed."""
        per_token = 16 * self.hidden + 2 * self.heads * self.seq_len
        return sequences * self.seq_len * self.checkpoint_interval * per_token

    @property
    def state_working_bytes(self) -> int:
        """Section 3 (MSWM): fp16 parameters and gradients of the largest matrix, which is hidden × 4 hidden."""
        return 4 * self.hidden * 4 * self.hidden

    def step_flops(self, sequences: float) -> float:
        """Section 4: FLOPs of forward, recomputed forward and backward of `sequences`."""
        return FLOPS_PER_PARAM * sequences * self.seq_len * self.params

    def params_intensity(self, sequences: float) -> float:
        """Section 4: FLOPs per byte of parameters and gradients that moves. `sequences` are those of a GPU."""
        return sequences * self.seq_len

    def optimizer_intensity(self, sequences: float) -> float:
        """Section 4: FLOPs per byte of optimizer states that moves."""
        return sequences * self.seq_len / 4

    @property
    def activations_intensity(self) -> float:
        """Section 4: FLOPs per byte of activation checkpoints that moves, the same for every batch."""
        return 24 * self.hidden * self.checkpoint_interval


def efficiency(intensity: float, bandwidth: float, peak: float) -> float:
    """Section 4: the share of `peak` FLOP/s that is left if bytes move at `bandwidth` and nothing overlaps."""
    return intensity * bandwidth / (intensity * bandwidth + peak)


SHAPES = (
    # GPT-3 (arXiv 2005.14165), table 2.1
    (12, 768, 12), (24, 1024, 16), (24, 1536, 16), (24, 2048, 16), (32, 2560, 32), (32, 4096, 32), (40, 5120, 40),
    (96, 12288, 96),
    # ZeRO-Infinity, figure 2a
    (80, 10240, 128), (100, 20480, 160), (128, 25600, 256), (195, 65536, 512), (315, 163840, 1024),
    # ZeRO-Infinity, table 1: 50B, 5T and 20T
    (62, 8192, 64), (174, 49152, 512), (205, 90112, 704),
    # for tests on small machines
    (2, 128, 2), (4, 256, 4), (6, 384, 6),
)  # fmt: skip
"""(layers, hidden, heads) of models that were trained or planned. A number of parameters stands for the nearest."""
TOLERANCE = 0.03
"""How far a shape's number of parameters may be from the number asked for, as a share of it."""


def shape_of(params: float, vocab: int = 0, seq_len: int = 1024) -> Transformer:
    """A transformer of about `params` parameters: the nearest known shape, with more or fewer layers where that is too
    far off."""
    layers, hidden, heads = min(SHAPES, key=lambda shape: abs(math.log(12 * shape[0] * shape[1] ** 2 / params)))
    model = Transformer(layers, hidden, heads, vocab, seq_len)
    if abs(model.params / params - 1) <= TOLERANCE:
        return model
    layers = max(1, round((params - vocab * hidden) / model.block_params))
    return Transformer(layers, hidden, heads, vocab, seq_len)
