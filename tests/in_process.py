"""A run of one rank in this process, without a launcher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from zinf_cli.plan.plan import Plan
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import dump_recipe, load_recipe
from zinf_cli.train import loop
from zinf_cli.train.figures import find_figures


class Closed(NamedTuple):
    """What a tier on drives had come to when it was closed, in bytes: the length of its files, and the traffic."""

    allocated: int
    written: int
    read: int


def run(recipe: Recipe, plan: Plan) -> list[dict[str, Any]]:
    """The metrics of a run in this process."""
    recipe.output_dir.mkdir(exist_ok=True)
    (recipe.output_dir / "recipe.yaml").write_text(dump_recipe(recipe))
    (recipe.output_dir / "plan.json").write_text(json.dumps(plan.to_json()))
    (recipe.output_dir / "logs").mkdir(exist_ok=True)
    assert loop.train(recipe.output_dir) == 0
    return [json.loads(line) for line in (recipe.output_dir / "metrics.jsonl").read_text().splitlines()]


def assert_goes_on_in_the_least_memory(file: Path, precision: str) -> Recipe:
    """Of a recipe's `file`, four steps at once, in `whole` beside it, and in two launches have the same losses."""
    losses = []
    for name, steps in (("parts", [2, 4]), ("whole", [4])):
        for last in steps:
            at = [f"output_dir={file.parent / name}", f"train.precision={precision}", f"train.max_steps={last}"]
            recipe = load_recipe(file, [*at, "checkpoint.interval=2"])
            plan = best_plan(recipe, find_figures(recipe, 1))
            lines = run(recipe, replace(plan, working=plan.working.shrunk(1 << 60)))
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1]
    return recipe
