"""Draws a llama's block of 256 MiB in tiles of 2 MiB; prints the bytes by which memory grew at its peak.

The argument says how: `parts` reads every tile of every parameter, `one` reads one small parameter.
"""

from __future__ import annotations

import sys

from tiny_models import random_source
from zinf_cli.train.model import build_model
from zinf_cli.train.process_memory import PeakMemory, process_memory
from zinf_cli.train.random_weights import RandomWeights

BLOCK, TILE = "model.layers.0.", 1 << 19

model = build_model(
    random_source("llama", hidden_size=2048, intermediate_size=8192, num_attention_heads=64, num_key_value_heads=1)
)
shapes = {name: param.shape for name, param in model.named_parameters() if name.startswith(BLOCK)}
weights = RandomWeights(model, 0)
weights.read_part(f"{BLOCK.replace('0', '1')}input_layernorm.weight", 0, 8)  # what torch sets up once
peak, before = PeakMemory(), process_memory()["VmRSS"]
peak.reset()
if sys.argv[1] == "one":
    weights.read([f"{BLOCK}input_layernorm.weight"])
else:
    for name, shape in shapes.items():
        for first in range(0, shape.numel(), TILE):
            weights.read_part(name, first, min(first + TILE, shape.numel()))
print(peak.read() - before)
