"""`python -m benchmarks.parts`: what it costs to compute blocks in parts where they would fit whole.

The same recipe, all four classes of state on NVMe, is trained whole and with every block in four parts, in processes of
their own, alternating. The step, the NVMe traffic and the peak memory are ratios of one run to the other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.case import MODELS
from benchmarks.contenders import WARM_UP, environment
from benchmarks.results import add_save, report
from zinf_cli.commands.launch import MALLOC
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import dump_recipe, load_recipe
from zinf_cli.run_folder.names import PLAN, RECIPE

TOKENS, MICRO_BATCHES = 64, 8
QUARTER = 4_200_000
"""Elements of a part: attention, gate, up and down of a block of the 216M model."""


def recipe_in(folder: Path, steps: int) -> Recipe:
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 8192, 500_000, dtype=np.int32))
    tiers = dict.fromkeys(("params", "grads", "optimizer", "activations"), "nvme")
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
            "logging": {"tensorboard": False},
            "output_dir": str(folder / "run"),
        }
    )


def one_run(folder: Path, most: int | None) -> dict[str, Any]:
    """Of a run in a process of its own, with a rank's heap: median step, NVMe bytes, peak memory, losses."""
    command = [sys.executable, "-m", "benchmarks.parts", "--inside", str(folder), json.dumps(most)]
    done = subprocess.run(command, env={**environment(folder), **MALLOC}, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    steps = lines[WARM_UP:]
    return {
        "step": statistics.median(line["step_s"] for line in steps),
        "traffic": statistics.median(line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in steps),
        "memory": max(line["cpu_bytes"] for line in lines),
        "losses": [line["loss"] for line in lines],
    }


def inside(folder: Path, most: int | None) -> None:
    """Plan and train in this process."""
    from zinf_cli.train import loop
    from zinf_cli.train.figures import find_figures

    recipe = load_recipe(folder / "recipe.yaml")
    run_dir = recipe.output_dir
    shutil.rmtree(run_dir, ignore_errors=True)
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / RECIPE).write_text(dump_recipe(recipe))
    (run_dir / PLAN).write_text(json.dumps(best_plan(recipe, find_figures(recipe, 1, most=most)).to_json()))
    loop.train(run_dir)
    print((run_dir / "metrics.jsonl").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="Blocks in four parts beside whole ones.")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turn")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    add_save(parser)
    arguments = parser.parse_args()
    if arguments.inside is not None:
        inside(Path(arguments.inside[0]), json.loads(arguments.inside[1]))
        return
    Path("runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="parts-", dir="runs")).absolute()
    try:
        (folder / "recipe.yaml").write_text(dump_recipe(recipe_in(folder, arguments.steps + WARM_UP)))
        pairs = [(one_run(folder, None), one_run(folder, QUARTER)) for _ in range(arguments.rounds)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = [{name: parts[name] / whole[name] for name in ("step", "traffic", "memory")} for whole, parts in pairs]
    for row, (whole, parts) in zip(rows, pairs, strict=True):
        losses = zip(whole["losses"], parts["losses"], strict=True)
        row["losses_apart"] = max(abs(ours / theirs - 1) for theirs, ours in losses)
    report(f"{MICRO_BATCHES}×{TOKENS}, blocks in four parts", rows, arguments.save, "parts by whole", pairs)


if __name__ == "__main__":
    main()
