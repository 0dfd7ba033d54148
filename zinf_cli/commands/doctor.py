"""`zinf doctor`: what this machine, every host of a hostfile, or a checkpoint has and lacks for a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from zinf_cli.checkpoint.folder import find_checkpoint
from zinf_cli.checkpoint.verify import verify
from zinf_cli.errors import DamagedError
from zinf_cli.launch.connection import Lifelines, transport_to
from zinf_cli.launch.preflight import check_hosts
from zinf_cli.recipe.hosts import Host, this_machine
from zinf_cli.screen import Screen
from zinf_cli.screens.launch import preflight_screen
from zinf_cli.screens.progress import progress
from zinf_cli.screens.run import checkpoint_screen


def doctor(hosts: Sequence[Host], *, as_json: bool, console: Console) -> None:
    """Look at `hosts`, or at this machine where there are none; PreflightError unless all are ready."""
    with Lifelines(transport_to(hosts)) as lifelines:
        preflight = check_hosts(hosts or (this_machine(1),), lifelines)
    if as_json:
        print(json.dumps(preflight.to_json(), indent=2))
    else:
        console.print(preflight_screen(preflight))
    preflight.require_ready()


def check_checkpoint(path: Path, *, as_json: bool, console: Console) -> None:
    """A verdict on every file; DamagedError unless all are whole."""
    folder = find_checkpoint(path)
    with progress(Screen(stderr=True), "reading the checkpoint") as tell:
        verdicts = verify(folder, tell)
    if as_json:
        print(json.dumps({"checkpoint": str(folder), "files": [dataclasses.asdict(v) for v in verdicts]}, indent=2))
    else:
        console.print(checkpoint_screen(folder, verdicts))
    if damaged := [verdict for verdict in verdicts if verdict.problem]:
        what = "; ".join(f"{verdict.name} is {verdict.problem}" for verdict in damaged)
        raise DamagedError(what, where=str(folder), hint="resume and export want another checkpoint of this run")
