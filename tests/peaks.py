"""Peaks of memory, each to be measured in a process of its own (own_processes.py)."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from in_process import run
from tiny_models import random_source
from tiny_recipes import CLASSES
from zinf_cli.engine.units import chunked_loss
from zinf_cli.models.model import build_model
from zinf_cli.models.random_weights import RandomWeights
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.train.export import export
from zinf_cli.train.figures import find_figures
from zinf_cli.train.process_memory import PeakMemory, process_memory, return_free_memory

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Options of glibc's mallopt."""
BLOCK, TILE = "model.layers.0.", 1 << 19


def peak_of_tiles(how: str) -> int:
    """Bytes by which memory grows at its peak where a llama's block of 256 MiB is drawn in tiles of 2 MiB.

    `parts` reads every tile of every parameter, `one` reads one small parameter.
    """
    model = build_model(
        random_source("llama", hidden_size=2048, intermediate_size=8192, num_attention_heads=64, num_key_value_heads=1)
    )
    shapes = {name: param.shape for name, param in model.named_parameters() if name.startswith(BLOCK)}
    weights = RandomWeights(model, 0)
    weights.read_part(f"{BLOCK.replace('0', '1')}input_layernorm.weight", 0, 8)  # what torch sets up once
    peak, before = PeakMemory(), process_memory()["VmRSS"]
    peak.reset()
    if how == "one":
        weights.read([f"{BLOCK}input_layernorm.weight"])
    else:
        for name, shape in shapes.items():
            for first in range(0, shape.numel(), TILE):
                weights.read_part(name, first, min(first + TILE, shape.numel()))
    return peak.read() - before


def peak_of_export(run_dir: Path) -> int:
    """Bytes of memory at its peak while a run is exported."""
    peak = PeakMemory()
    peak.reset()
    export(run_dir, run_dir / "out")
    return peak.read()


@dataclass(frozen=True)
class PeakOfLoss:
    """Bytes: the peak, what was planned of it, and what of that is for compute, in chunks of logits and with all."""

    peak: int
    planned: int
    compute: int
    whole: int


def peak_of_loss(folder: Path) -> PeakOfLoss:
    """Of the training of a model with a large vocabulary, 2048 tokens a micro-batch."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    np.save(folder / "tokens.npy", np.arange(1 << 14) * 7 % (1 << 17))
    model: dict[str, Any] = {
        "model_type": "llama", "vocab_size": 1 << 17, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 2048,
    }  # fmt: skip
    recipe = _recipe(folder, model, seq_len=2048, max_steps=1)
    chunk, chunked_loss.CHUNK = chunked_loss.CHUNK, 1 << 60
    whole = best_plan(recipe, find_figures(recipe, 1))
    chunked_loss.CHUNK = chunk
    plan = best_plan(recipe, find_figures(recipe, 1))
    peak = PeakMemory()
    peak.reset()
    run(recipe, plan)
    planned = sum(line.num_bytes for line in plan.lines if line.tier == "cpu")
    return PeakOfLoss(peak.read(), planned, _for_compute(plan), _for_compute(whole))


def _recipe(folder: Path, model: dict[str, Any], **train: int) -> Recipe:
    """All of it on NVMe, one micro-batch of one sequence a step, of the tokens in `folder`."""
    return Recipe.model_validate(
        {
            "model": {"config": model},
            "dataset": {"path": str(folder / "tokens.npy")},
            "train": {"micro_batch_size": 1, "global_batch_size": 1, **train},
            "offload": {**dict.fromkeys(CLASSES, "nvme"), "nvme_path": str(folder / "nvme")},
            "logging": {"tensorboard": False, "report": False},
            "output_dir": str(folder / "run"),
        }
    )


def _for_compute(plan: Plan) -> int:
    return sum(line.num_bytes for line in plan.lines if line.what == "compute")


@dataclass(frozen=True)
class PeakOfLayer:
    """Bytes: by how much memory grows at its peak, and what was planned beside what a process has anyway."""

    peak: int
    planned: int


def peak_of_layer(folder: Path, experts: int) -> PeakOfLayer:
    """Of training with the least buffers: a layer of `experts` experts, 4 for each of 16 tokens, each of them a part.

    Without experts: a dense layer of 8 experts' size, whole.
    """
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    np.save(folder / "tokens.npy", np.arange(1 << 10) * 7 % 96)
    hidden, width = 512, 512
    model: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    if experts:
        mixture = {"num_experts": experts, "num_experts_per_tok": 4, "moe_intermediate_size": width}
        model |= {"model_type": "qwen3_moe", **mixture}
    else:
        model |= {"model_type": "qwen3", "intermediate_size": 8 * width}
    recipe = _recipe(folder, model, seq_len=16, max_steps=2)
    figures = find_figures(recipe, 1, most=3 * hidden * width if experts else None)
    plan = best_plan(recipe, figures)
    plan = replace(plan, working=plan.working.shrunk(1 << 60))
    libc = ctypes.CDLL(None)
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 1 << 18), (M_TRIM_THRESHOLD, 1 << 18)):
        libc.mallopt(option, value)  # what is free goes back to the kernel, so that memory is what is in use
    return_free_memory()
    peak, before = PeakMemory(), process_memory()["VmRSS"]
    peak.reset()
    run(recipe, plan)
    return PeakOfLayer(peak.read() - before, _for_compute(plan) + plan.working.total)
