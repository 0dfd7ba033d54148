"""Two ways to train one recipe, beside each other: each run in a process of its own, the two in turn.

A benchmark module is started again for each run, with `--inside FOLDER WAY`. There it plans, trains and prints.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.contenders import environment
from benchmarks.results import add_save
from zinf_cli.plan.plan import Plan
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import dump_recipe, load_recipe
from zinf_cli.run_folder.names import METRICS, PLAN, RECIPE

Run = Mapping[str, Any]
"""What one run has found; its losses among it."""


def arguments_of(description: str, steps: int) -> argparse.Namespace:
    """The command line of such a benchmark. `inside` is [folder, way] in a process that was started for a run."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help="measured steps of each run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, in turn")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    add_save(parser)
    arguments = parser.parse_args()
    if arguments.inside is not None:
        arguments.inside = Path(arguments.inside[0]), json.loads(arguments.inside[1])
    return arguments


def in_turn(
    recipe_in: Callable[[Path], Recipe], one_run: Callable[[Path, Any], Run], ways: tuple[Any, Any], rounds: int
) -> list[tuple[Run, Run]]:
    """The runs of the two `ways`, `rounds` of each. Their folder has the recipe and is removed."""
    Path("runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="pairs-", dir="runs")).absolute()
    try:
        (folder / "recipe.yaml").write_text(dump_recipe(recipe_in(folder)))
        return [(one_run(folder, ways[0]), one_run(folder, ways[1])) for _ in range(rounds)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def printed_by(module: str, folder: Path, way: Any, more: Mapping[str, str] | None = None) -> list[str]:
    """The lines that a run prints, with `more` in its environment."""
    command = [sys.executable, "-m", module, "--inside", str(folder), json.dumps(way)]
    variables = {**environment(folder), **(more or {})}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.splitlines()


def laid_out(folder: Path, most: int | None = None) -> tuple[Path, Plan]:
    """The folder of a run of the recipe in `folder`, ready to be trained in this process, and the plan."""
    from zinf_cli.plan.search import best_plan
    from zinf_cli.train.figures import find_figures

    recipe = load_recipe(folder / "recipe.yaml")
    run_dir = recipe.output_dir
    shutil.rmtree(run_dir, ignore_errors=True)
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / RECIPE).write_text(dump_recipe(recipe))
    plan = best_plan(recipe, find_figures(recipe, 1, most=most))
    (run_dir / PLAN).write_text(json.dumps(plan.to_json()))
    return run_dir, plan


def train_as_a_rank(run_dir: Path) -> None:
    """Train in this process, with heaps as a rank has them (the caller starts it with MALLOC), and print the steps."""
    import torch

    from zinf_cli.train import loop
    from zinf_cli.train.process_memory import heap_for_each

    heap_for_each(torch.get_num_threads())
    loop.train(run_dir)
    print((run_dir / METRICS).read_text())


def losses_apart(pair: tuple[Run, Run]) -> float:
    """The largest relative difference between the losses of two runs."""
    losses: Iterable[tuple[float, float]] = zip(pair[0]["losses"], pair[1]["losses"], strict=True)
    return max(abs(ours / theirs - 1) for theirs, ours in losses)
