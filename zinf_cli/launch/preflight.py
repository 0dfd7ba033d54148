"""Checks that every host is ready, before anything starts. All are asked at once, and all problems are told at once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from zinf_cli.amounts import format_bytes
from zinf_cli.errors import HostError, PreflightError, ReportedError
from zinf_cli.launch.connection import Connection, Lifelines, at_all
from zinf_cli.launch.rendezvous import Rendezvous, find_rendezvous
from zinf_cli.machine.hardware import Space, room_of
from zinf_cli.recipe.hosts import Host, first_names
from zinf_cli.search_path import module_command
from zinf_cli.version import code_digest

COLUMNS = (
    "by", "python", "zinf", "torch", "slots", "memory", "nvme", "files", "clock", "memlock", "huge pages", "rendezvous",
)  # fmt: skip

_FACTS_S = 120.0
_MOST_SKEW_S = 5.0
"""If clocks differ by more seconds, they can't tell which rank failed first."""


@dataclass
class Row:
    """What was found out about a host: a short text for each column that was checked."""

    host: Host
    connection: Connection | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    cells: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    """For a column, what is wrong and what to do about it."""

    def note(self, column: str, text: str, problem: str | None = None) -> None:
        self.cells[column] = text
        if problem is not None:
            self.problems[column] = problem


@dataclass(frozen=True)
class Preflight:
    """What was found out about all hosts."""

    rows: Sequence[Row]
    rendezvous: Rendezvous | None
    absent: Sequence[Row] = ()
    """Hosts that do not answer and are not needed."""

    @property
    def problems(self) -> list[str]:
        """All problems of all hosts, as "host: problem"."""
        return problems_of(self.rows)

    @property
    def connections(self) -> list[Connection]:
        return [row.connection for row in self.rows if row.connection is not None]

    def require_ready(self) -> None:
        """PreflightError unless all hosts are ready."""
        count = sum(bool(row.problems) for row in self.rows)
        if count:
            raise PreflightError(f"{count} of {len(self.rows)} hosts are not ready", hint="nothing was started")

    def to_json(self) -> list[dict[str, Any]]:
        """For each host its checks and its problems, by column, and the facts that they follow from."""
        return [
            {"host": row.host.name, "checks": row.cells, "problems": row.problems, "facts": row.facts}
            for row in self.rows
        ]


def problems_of(rows: Sequence[Row], before: str = "") -> list[str]:
    """Each problem, after the hosts that have it and `before`."""
    hosts: dict[str, list[str]] = {}
    for row in rows:
        for problem in row.problems.values():
            hosts.setdefault(problem, []).append(row.host.name)
    return [f"{first_names(names)}: {before}{problem}" for problem, names in hosts.items()]


def check_hosts(
    hosts: Sequence[Host],
    lifelines: Lifelines,
    *,
    paths: Sequence[str] = (),
    nvme: Sequence[str] = (),
    min_hosts: int | None = None,
    ahead: Sequence[Mapping[str, Any]] = (),
) -> Preflight:
    """Connect to every host and check it. `paths` have to be the same on all; `nvme` are folders on drives.

    At least `min_hosts` have to answer, by default all. `ahead` is, for each host, the process that stands by there.
    """
    rows = [Row(host) for host in hosts]
    lifelines.branch_out(hosts)
    question = json.dumps({"paths": list(paths), "nvme": list(nvme)})
    at_all(lambda one: _ask(one[0], lifelines, question, one[1]), list(zip_longest(rows, ahead)))
    absent = [row for row in rows if row.connection is None]
    if min_hosts is not None and len(rows) - len(absent) >= min_hosts:
        rows = [row for row in rows if row.connection is not None]
    else:
        absent = []
    answered = [row for row in rows if row.facts]
    here, accelerated = code_digest(), any(row.facts["accelerators"] for row in answered)
    for row in answered:
        _judge(row, answered[0], here)
        _judge_slots(row, accelerated)
    for path in paths:
        _compare(path, answered)
    ready = [row for row in rows if row.connection is not None]
    rendezvous = _meet(ready) if len(ready) == len(rows) > 1 else None
    return Preflight(rows, rendezvous, absent)


def _ask(row: Row, lifelines: Lifelines, question: str, ahead: Mapping[str, Any] | None) -> None:
    """Connect to a host and ask for its facts."""
    try:
        row.connection = lifelines.connect(row.host)
    except HostError as error:
        row.note("by", "no", f"{error.message} ({error.hint})" if error.hint else error.message)
        return
    row.note("by", lifelines.way_to(row.host))
    row.note("python", row.connection.python)
    command = module_command("zinf_cli.launch.facts")
    asked = time.time()
    try:
        done = row.connection.capture(command, within=_FACTS_S, text=question)
        if ahead is not None:  # after the facts: these say how much memory is free
            row.connection.request("stand_by", **ahead)
    except HostError as error:
        row.note("zinf", "no", error.message)
        return
    if done["code"] != 0:
        last = done["errors"].strip().splitlines()[-1:] or [f"exit code {done['code']}"]
        why = f"zinf does not run there by {sys.executable}: {last[0]}"
        if "can't open file" in last[0]:
            why = f"what is there is not the launcher's zinf: no {command[1]} (install the same there, or --sync)"
        row.note("zinf", "no", why)
        return
    row.facts = json.loads(done["output"])
    there = row.facts.pop("time")
    row.facts["skew"] = there - min(max(there, asked), time.time())


def _judge(row: Row, first: Row, here: str) -> None:
    """Fill the row of a host from its facts, and compare these with those of the first host and of the launcher."""
    facts = row.facts
    row.note(
        "zinf",
        facts["code"],
        None if facts["code"] == here else f"zinf {facts['code']} is not the launcher's {here}: install the same there",
    )
    torch = first.facts["torch"]
    row.note(
        "torch",
        facts["torch"],
        None if facts["torch"] == torch else f"torch {facts['torch']}, but {torch} on {first.host.name}",
    )
    row.note("memory", format_bytes(facts["memory"]))
    for drive in facts["drives"].values():
        _judge_drive(row, drive)
    skew = facts["skew"]
    row.note(
        "clock",
        "ok" if abs(skew) < 0.1 else f"{skew:+.1f} s",
        None
        if abs(skew) < _MOST_SKEW_S
        else f"its clock is {skew:+.0f} s off this machine's: start an NTP service there",
    )
    limit = facts["memlock"]
    row.note("memlock", "unlimited" if limit < 0 else format_bytes(limit))
    row.note("huge pages", facts["huge_pages"])


def _judge_slots(row: Row, accelerated: bool) -> None:
    there, wanted = row.facts["accelerators"], row.host.slots
    cores = row.facts["cores"]
    shared = f", share {cores} {'core' if cores == 1 else 'cores'}" if cores < len(wanted) else ""
    if not accelerated:
        row.note("slots", f"{len(wanted)} CPU{shared}")
        return
    problem = None
    if wanted[-1] >= there:
        problem = f"slot {wanted[-1]} is asked for, but there are {there} accelerators (nvidia)"
    row.note("slots", f"{len(wanted)} of {there}{shared}", problem)


def _judge_drive(row: Row, drive: dict[str, Any]) -> None:
    if drive["problem"] is not None:
        row.note("nvme", "no", ReportedError(**drive["problem"]).line())
    elif "nvme" not in row.problems:
        spaces = drives_of(row.facts)
        how = "memory" if any(space.in_memory for space in spaces) else "buffered"
        direct = all(space.direct for space in spaces)
        row.note("nvme", format_bytes(room_of(spaces)) + ("" if direct else f", {how}") + _far(row.facts["nodes"]))


def _far(nodes: Mapping[str, Sequence[int]]) -> str:
    """Where drives hang on other nodes than accelerators do: what one moves to the other crosses between sockets."""
    drives, accelerators = nodes["drives"], nodes["accelerators"]
    if not drives or not accelerators or drives == accelerators:
        return ""
    here, there = (", ".join(map(str, some)) for some in (drives, accelerators))
    return f", node {here} (accelerators: {there})"


def drives_of(facts: dict[str, Any]) -> list[Space]:
    """What a host's folders can hold, without those that have a problem."""
    return [
        Space(**{name: value for name, value in drive.items() if name != "problem"})
        for drive in facts["drives"].values()
        if drive["problem"] is None
    ]


def _compare(path: str, answered: Sequence[Row]) -> None:
    """Check that `path` has the same files everywhere, by names, sizes and the text of config.json."""
    first = next((row for row in answered if row.facts["paths"][path] is not None), None)
    for row in answered:
        contents = row.facts["paths"][path]
        if contents is None:
            row.note("files", "no", f"{path}: no such file or folder there")
        elif first is not None and contents != first.facts["paths"][path]:
            row.note(
                "files", "differ", f"{path}: not the same files as on {first.host.name} (names, sizes, config.json)"
            )
        elif "files" not in row.problems:
            row.note("files", "ok")


def _meet(rows: Sequence[Row]) -> Rendezvous | None:
    """Open a port on the first host, and have all other hosts try it."""
    try:
        rendezvous = find_rendezvous([row.connection for row in rows if row.connection is not None])
    except HostError as error:
        rows[0].note("rendezvous", "no", f"can't open a port for the ranks to meet: {error.message}")
        return None
    for row, way in zip(rows, rendezvous.ways, strict=True):
        if isinstance(way, HostError):
            row.note("rendezvous", "no", f"{way.message}, where the ranks meet: open the firewall between the hosts")
        else:
            row.note("rendezvous", f"by {way}" if way else "ok")
    return rendezvous
