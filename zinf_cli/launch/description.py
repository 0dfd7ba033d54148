"""What the plan needs to know of a recipe, from a process on one of the hosts (train/described.py)."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from zinf_cli.errors import RankError, ZinfError
from zinf_cli.hosts import Host
from zinf_cli.launch.connection import Connection, Lifelines
from zinf_cli.plan.layout import Figures
from zinf_cli.recipe import Recipe
from zinf_cli.recipe_file import dump_recipe

_MOST_S = 24 * 3600.0
"""Tokenising may take long; Ctrl-C ends it."""


class ReportedError(ZinfError):
    """An error found in another process, already described there."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


def describe(recipe: Recipe, slots: int | None, hosts: Sequence[Host], connection: Connection) -> Figures:
    """Ask a process of that host, which builds the model on the meta device, unless it has been asked before."""
    command = [sys.executable, "-m", "zinf_cli.train.described", "/dev/stdin"]
    command += ["--slots", str(slots)] if slots else []
    if hosts:
        counts = [len(host.slots) for host in hosts]
        command += ["--slots", str(max(counts)), "--world-size", str(sum(counts))]
    done = connection.capture(command, within=_MOST_S, text=dump_recipe(recipe))
    try:
        document = json.loads(done["output"])
    except json.JSONDecodeError as error:
        last = done["errors"].strip().splitlines()[-1:] or [f"exit code {done['code']}"]
        raise RankError(f"the model could not be described: {last[0]}", hint=done["errors"].strip()) from error
    if "error" in document:
        raise ReportedError(document["error"], document["exit_code"])
    return Figures.from_json(document)


class Describing:
    """`describe` on the first of `hosts`, by a connection of its own, while these are looked at."""

    def __init__(self, recipe: Recipe, hosts: Sequence[Host], lifelines: Lifelines) -> None:
        self._recipe = recipe
        self._hosts = list(hosts)
        self._lifelines = lifelines
        self._found: Future[Figures] = Future()
        threading.Thread(target=self._run, name="describing", daemon=True).start()

    def figures(self, hosts: Sequence[Host], connection: Connection) -> Figures:
        """What was found; where `hosts`, those that are ready, are not all of them, asked again by `connection`."""
        if list(hosts) != self._hosts:
            return describe(self._recipe, None, hosts, connection)
        return self._found.result()

    def _run(self) -> None:
        try:
            connection = self._lifelines.connect(self._hosts[0])
            self._found.set_result(describe(self._recipe, None, self._hosts, connection))
            connection.close()
        except ZinfError as error:
            self._found.set_exception(error)
