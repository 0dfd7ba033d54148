"""`python -m benchmarks.loss_chunks`: the loss in chunks of logits beside the loss of all of them.

A llama of one layer (hidden 1024, vocabulary 128K, its head tied to the embedding) learns from 2048 tokens a step, all
four classes of state on NVMe, with all logits and in chunks, in processes of their own, alternating. The step, its CPU
seconds and the memory of compute are ratios of one run to the other. CPU seconds are what to compare while others use
the machine. The gradient of the head's weight is no part of that memory: both make it alike.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pairs import arguments_of, in_turn, laid_out, losses_apart, printed_by
from benchmarks.results import report
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.run_folder.names import METRICS

VOCABULARY, HIDDEN, TOKENS = 1 << 17, 1024, 2048
WARM_UP = 1
"""Steps that are not measured."""


def recipe_in(folder: Path, steps: int) -> Recipe:
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, VOCABULARY, 100_000, dtype=np.int32))
    tiers = dict.fromkeys(("params", "grads", "optimizer", "activations"), "nvme")
    return Recipe.model_validate(
        {
            "model": {
                "config": {
                    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": HIDDEN,
                    "num_hidden_layers": 1, "num_attention_heads": 16, "max_position_embeddings": TOKENS,
                    "tie_word_embeddings": True,
                }
            },
            "dataset": {"path": str(folder / "tokens.npy")},
            "train": {
                "seq_len": TOKENS, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": steps,
            },
            "optimizer": {"lr": 1e-4},
            "offload": {**tiers, "nvme_path": str(folder / "nvme")},
            "logging": {"tensorboard": False, "report": False},
            "output_dir": str(folder / "run"),
        }
    )  # fmt: skip


def one_run(folder: Path, in_chunks: bool) -> dict[str, Any]:
    """A run in a process of its own: seconds and CPU seconds of its steps, memory of its compute, its losses."""
    found: dict[str, Any] = json.loads(printed_by("benchmarks.loss_chunks", folder, in_chunks)[-1])
    return found


def inside(folder: Path, in_chunks: bool) -> None:
    """Plan and train in this process. Memory of compute is the peak without what the plan has for all else, and without
    the gradient of the head's weight."""
    from zinf_cli.engine.units import chunked_loss
    from zinf_cli.train import loop

    if not in_chunks:
        chunked_loss.CHUNK = 1 << 60
    run_dir, plan = laid_out(folder)
    planned = {line.what: line.num_bytes for line in plan.lines if line.tier == "cpu"}
    gradient = max(unit.gradient_bytes for unit in plan.figures.model.units)
    ends: list[float] = []
    threading.Thread(target=_watch, args=(run_dir / METRICS, ends), daemon=True).start()
    loop.train(run_dir)
    lines = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    found = {
        "step": statistics.median(line["step_s"] for line in lines[WARM_UP:]),
        "cpu": (ends[-1] - ends[WARM_UP - 1]) / (len(ends) - WARM_UP),
        "compute": max(line["cpu_bytes"] for line in lines) - sum(planned.values()) + planned["compute"] - gradient,
        "planned": planned["compute"] - gradient,
        "losses": [line["loss"] for line in lines],
    }
    print("\n" + json.dumps(found))


def _watch(metrics: Path, ends: list[float]) -> None:
    """Add the CPU seconds of this process at the end of each step, as its line appears."""
    while True:
        lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        ends += [time.process_time()] * (lines - len(ends))
        time.sleep(0.01)


def main() -> None:
    arguments = arguments_of("The loss in chunks beside the loss of all logits.", steps=3)
    if arguments.inside is not None:
        inside(*arguments.inside)
        return
    recipe = partial(recipe_in, steps=arguments.steps + WARM_UP)
    pairs = in_turn(recipe, one_run, (False, True), arguments.rounds)
    rows = [
        {
            "step": chunks["step"] / whole["step"],
            "CPU": chunks["cpu"] / whole["cpu"],
            "whole_compute_bytes": whole["compute"],
            "compute_bytes": chunks["compute"],
            "planned_compute_bytes": chunks["planned"],
            "losses_apart": losses_apart((whole, chunks)),
        }
        for whole, chunks in pairs
    ]
    report("2048 tokens, vocabulary 128K", rows, arguments.save, "chunks by whole", pairs)


if __name__ == "__main__":
    main()
