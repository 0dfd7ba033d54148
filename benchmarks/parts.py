"""`python -m benchmarks.parts`: what it costs to compute blocks in parts where they would fit whole.

The same recipe, its state on NVMe and its activations where the plan puts them, is trained whole and with every block
in four parts, in processes of their own, alternating. Step, NVMe traffic and peak memory are ratios of the runs.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.case import MODELS
from benchmarks.contenders import WARM_UP
from benchmarks.pairs import arguments_of, in_turn, laid_out, losses_apart, printed_by, train_as_a_rank
from benchmarks.results import report
from zinf_cli.commands.launch import MALLOC
from zinf_cli.recipe.recipe import Recipe

TOKENS, MICRO_BATCHES = 64, 8
QUARTER = 4_200_000
"""Elements of a part: attention, gate, up and down of a block of the 216M model."""


def recipe_in(folder: Path, steps: int) -> Recipe:
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 8192, 500_000, dtype=np.int32))
    tiers = dict.fromkeys(("params", "grads", "optimizer"), "nvme")
    return Recipe.model_validate(
        {
            "model": {"config": MODELS["216M"]},
            "dataset": {"path": str(folder / "tokens.npy")},
            "train": {
                "seq_len": TOKENS,
                "micro_batch_size": 1,
                "gradient_accumulation_steps": MICRO_BATCHES,
                "max_steps": steps,
            },
            "optimizer": {"lr": 1e-4},
            "activation_checkpointing": "unit",
            "offload": {**tiers, "nvme_path": str(folder / "nvme")},
            "logging": {"tensorboard": False, "report": False},
            "output_dir": str(folder / "run"),
        }
    )


def one_run(folder: Path, most: int | None) -> dict[str, Any]:
    """Of a run in a process of its own, with a rank's heap: median step, NVMe bytes, peak memory, losses."""
    said = printed_by("benchmarks.parts", folder, most, MALLOC)
    lines = [json.loads(line) for line in said if line.startswith("{")]
    steps = lines[WARM_UP:]
    return {
        "step": statistics.median(line["step_s"] for line in steps),
        "traffic": statistics.median(line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in steps),
        "memory": max(line["cpu_bytes"] for line in lines),
        "losses": [line["loss"] for line in lines],
    }


def inside(folder: Path, most: int | None) -> None:
    """Plan and train in this process."""
    run_dir, _ = laid_out(folder, most)
    train_as_a_rank(run_dir)


def main() -> None:
    arguments = arguments_of("Blocks in four parts beside whole ones.", steps=4)
    if arguments.inside is not None:
        inside(*arguments.inside)
        return
    recipe = partial(recipe_in, steps=arguments.steps + WARM_UP)
    pairs = in_turn(recipe, one_run, (None, QUARTER), arguments.rounds)
    rows = [
        {name: pair[1][name] / pair[0][name] for name in ("step", "traffic", "memory")}
        | {"losses_apart": losses_apart(pair)}
        for pair in pairs
    ]
    report(f"{MICRO_BATCHES}×{TOKENS}, blocks in four parts", rows, arguments.save, "parts by whole", pairs)


if __name__ == "__main__":
    main()
