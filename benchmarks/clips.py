"""`python -m benchmarks.clips`: what updates in backward gain where one step of so many clips.

A llama of 216M parameters, all state on NVMe, is trained twice, in processes of their own that take turns: with updates
in backward as the plan has it, and with none, so that all are made in the next forward. Every tenth step is clipped, as
if the norm were far too large, and no other. Seconds, waiting and bytes are means of whole tens of steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.case import NEVER_CLIPS, Case
from benchmarks.contenders import launch_command
from benchmarks.pairs import Run, arguments_of, in_turn, laid_out, losses_apart, printed_by, train_as_a_rank
from benchmarks.results import report
from zinf_cli.commands.launch import MALLOC
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.run_folder.names import PLAN

EVERY = 10
"""Of so many steps one is clipped."""
CASES = (Case(1, 16), Case(8, 16))
WAYS = ("in forward", "as planned")
"""Where updates are made."""


def recipe_in(folder: Path, case: Case, steps: int) -> Recipe:
    launch_command(case, "nvme", steps, folder)
    return load_recipe(folder / "zinf-nvme.yaml")


def one_run(folder: Path, way: str) -> dict[str, Any]:
    """Of a run in a process of its own, with a rank's heap. Its first ten steps do not count."""
    said = printed_by("benchmarks.clips", folder, way, MALLOC)
    lines = [json.loads(line) for line in said if line.startswith("{")]
    steps = lines[EVERY:]
    return {
        "step_s": mean(line["step_s"] for line in steps),
        "waiting_share": sum(line["wait_s"] for line in steps) / sum(line["step_s"] for line in steps),
        "moved_per_step_bytes": mean(line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in steps),
        "updated_in_backward_share": mean(line["updated_in_backward"] for line in steps),
        "losses": [line["loss"] for line in lines],
    }


def inside(folder: Path, way: str) -> None:
    """Plan and train in this process."""
    from zinf_cli.engine.engine import Engine

    run_dir, plan = laid_out(folder)
    if way == WAYS[0]:  # no share of clipped steps is below it
        (run_dir / PLAN).write_text(json.dumps(replace(plan, clips_worth=0.0).to_json()))
    step, taken = Engine.train_step, iter(range(1, 1_000_000))

    @wraps(step)
    def clipped_now_and_then(*args: Any, **kwargs: Any) -> Any:
        norm = 1.0 if next(taken) % EVERY == EVERY // 2 else NEVER_CLIPS
        return step(*args, **{**kwargs, "max_grad_norm": norm})

    Engine.train_step = clipped_now_and_then  # type: ignore[method-assign]
    train_as_a_rank(run_dir)


def main() -> None:
    arguments = arguments_of("Updates in backward where one step of ten clips.", steps=2 * EVERY)
    if arguments.inside is not None:
        inside(*arguments.inside)
        return
    for case in CASES:
        recipe = partial(recipe_in, case=case, steps=arguments.steps + EVERY)
        pairs = in_turn(recipe, one_run, WAYS, arguments.rounds)
        assert all(losses_apart(pair) == 0 for pair in pairs), "when an update is made must change no loss"
        rows = [row for pair in pairs for row in _rows(pair)]
        report(f"{case}, one step of {EVERY} clipped", rows, arguments.save, measured=pairs)


def _rows(pair: Sequence[Run]) -> list[dict[str, Any]]:
    return [
        {"updates": way, "ratio": run["step_s"] / pair[0]["step_s"]}
        | {key: value for key, value in run.items() if key != "losses"}
        for way, run in zip(WAYS, pair, strict=True)
    ]


if __name__ == "__main__":
    main()
