"""`zinf doctor`: what this machine, or every host of a hostfile, has and lacks for a run."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console

from zinf_cli.hosts import Host, this_machine
from zinf_cli.launch.connection import Lifelines, transport_to
from zinf_cli.launch.preflight import check_hosts
from zinf_cli.launch.screens import preflight_screen


def doctor(hosts: Sequence[Host], *, as_json: bool, console: Console) -> None:
    """Look at `hosts`, or at this machine where there are none; PreflightError unless all are ready."""
    with Lifelines(transport_to(hosts)) as lifelines:
        preflight = check_hosts(hosts or (this_machine(1),), lifelines)
    if as_json:
        print(json.dumps(preflight.to_json(), indent=2))
    else:
        console.print(preflight_screen(preflight))
    preflight.require_ready()
