"""Trains a model of a large vocabulary in the folder that is the first argument, 2048 tokens a micro-batch.

Prints as JSON, in bytes: its peak memory, what was planned of it, and what of that is for compute: in chunks of logits,
and with all logits.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from in_process import run
from zinf_cli.engine.units import chunked_loss
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.train.figures import find_figures
from zinf_cli.train.process_memory import PeakMemory


def for_compute(plan: Plan) -> int:
    return sum(line.num_bytes for line in plan.lines if line.what == "compute")


folder = Path(sys.argv[1])
os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
np.save(folder / "tokens.npy", np.arange(1 << 14) * 7 % (1 << 17))
recipe = Recipe.model_validate(
    {
        "model": {
            "config": {
                "model_type": "llama", "vocab_size": 1 << 17, "hidden_size": 64, "intermediate_size": 128,
                "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 2048,
            }
        },
        "dataset": {"path": str(folder / "tokens.npy")},
        "train": {"seq_len": 2048, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 1},
        "offload": {
            **dict.fromkeys(("params", "grads", "optimizer", "activations"), "nvme"), "nvme_path": str(folder / "nvme"),
        },
        "logging": {"tensorboard": False},
        "output_dir": str(folder / "run"),
    }
)  # fmt: skip
chunk, chunked_loss.CHUNK = chunked_loss.CHUNK, 1 << 60
whole = best_plan(recipe, find_figures(recipe, 1))
chunked_loss.CHUNK = chunk
plan = best_plan(recipe, find_figures(recipe, 1))
peak = PeakMemory()
peak.reset()
run(recipe, plan)
planned = sum(line.num_bytes for line in plan.lines if line.tier == "cpu")
told = {"peak": peak.read(), "planned": planned, "compute": for_compute(plan), "whole": for_compute(whole)}
print(json.dumps(told))
