"""Launches two ranks of programs/ranks.py: SCENARIO RUN_DIR. Prints how they ended as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from zinf_cli.errors import ZinfError
from zinf_cli.launch.connection import Lifelines
from zinf_cli.launch.pipes import Pipes
from zinf_cli.launch.program import Agent, Program
from zinf_cli.launch.runner import World, run_ranks
from zinf_cli.recipe.hosts import this_machine


def told(value: object) -> Any:
    return value.to_json() if isinstance(value, ZinfError) else str(value)


polls: list[int] = []
notes: list[str] = []
scenario, run_dir = sys.argv[1], Path(sys.argv[2])
program = Program(Agent("programs.ranks"), "life", [scenario], run_dir, {}, [], False, {"OMP_NUM_THREADS": "1"})
with Lifelines(Pipes()) as lifelines:
    world = World(lifelines, [lifelines.connect(this_machine(2))])
    outcome = run_ranks(program, world, on_poll=lambda: polls.append(1), notify=notes.append)
print(json.dumps({**dataclasses.asdict(outcome), "polls": len(polls), "notes": notes}, default=told))
