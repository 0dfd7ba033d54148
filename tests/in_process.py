"""A run of one rank in this process, without a launcher."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from zinf_cli.plan.plan import Plan
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import dump_recipe
from zinf_cli.train import loop


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
