"""Plays a step on a hardware profile: how long it takes, how busy each lane is, what bounds it.

A lane does one thing at a time; among what is ready it takes what comes first in the schedule. The drive's two lanes
slow each other down where it moves less in both directions than the sum of each alone; so do the drive and compute that
is done by the cores that serve it.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zinf_cli.durable import write_durably
from zinf_cli.machine.profiles import Profile
from zinf_cli.plan.schedule import ADAMW_BYTES, LANES, Op, Step, sweep_steps

RESOURCES = {
    "compute": ("compute",),
    "update": ("update",),
    "network": ("network",),
    "cpu link": ("copy in", "copy out"),
    "nvme": ("nvme read", "nvme write"),
}
"""What a user can buy more of, and its lanes."""


@dataclass(frozen=True)
class Cluster:
    """Hosts, ranks on each, and what they compute with."""

    hosts: int
    ranks: int
    """Of one host."""
    precision: str
    rows: float
    """Tokens of a micro-batch: rows of the activations."""


@dataclass(frozen=True)
class Simulation:
    """One step in its steady state. Shares are of its time."""

    step_s: float
    busy: Mapping[str, float]
    """By lane."""
    bottleneck: str
    """The resource that is busy most."""
    ops: Sequence[Op]
    spans: Sequence[tuple[float, float]]
    """(start, end) of every operation, seconds; the last step ends the list."""

    @property
    def waiting(self) -> float:
        """The share in which compute waits for data."""
        return max(0.0, 1 - self.busy["compute"])


def rates_of(profile: Profile, host: Cluster) -> dict[str, float]:
    """The speed of each lane of one rank while all of them are at work; "both" is the drive's in sum.

    "drive share" and "compute share" are what the drive and compute leave of each other.
    """
    ranks, drives = host.ranks, profile.drives
    network = profile.collective_across if host.hosts > 1 else profile.collective_inside
    share = 1 if profile.accelerators else ranks
    on_device = profile.device_bandwidth / ADAMW_BYTES if profile.accelerators else profile.adamw / ranks
    return {
        "matmul": profile.flops(host.precision, host.rows) / share,
        "adamw": on_device,
        "cpu adamw": profile.adamw / ranks,
        "network": network,
        "inside": profile.collective_inside,
        "copy in": profile.copy(ranks),
        "copy out": profile.copy(ranks),
        "nvme read": drives.read / ranks,
        "nvme write": drives.write / ranks,
        "both": drives.both / ranks,
        "drive share": 1.0 if profile.accelerators else drives.beside_compute,
        "compute share": 1.0 if profile.accelerators else drives.compute_beside,
    }


def simulate(step: Step, profile: Profile, host: Cluster) -> Simulation:
    """zinf's schedule of `step` on `host`."""
    return play(*sweep_steps(step), rates_of(profile, host))


def play(ops: Sequence[Op], ends: Sequence[int], rates: Mapping[str, float]) -> Simulation:
    """Play `ops`; the step is what lies between the last two of `ends`."""
    seconds = [op.amount / rates[op.rate] for op in ops]
    together = rates["both"] / (rates["nvme read"] + rates["nvme write"])
    spans = _play(ops, seconds, min(1.0, together), rates["drive share"], rates["compute share"])
    begin, end = (spans[place][1] for place in ends[-2:])
    step_s = end - begin
    busy = dict.fromkeys(LANES, 0.0)
    for op, (start, stop) in zip(ops, spans, strict=True):
        busy[op.lane] += max(0.0, min(stop, end) - max(start, begin)) / step_s
    load = {name: max(busy[lane] for lane in lanes) for name, lanes in RESOURCES.items()}
    return Simulation(step_s, busy, max(load, key=lambda name: load[name]), ops, spans)


def _play(
    ops: Sequence[Op], seconds: Sequence[float], together: float, drive_share: float, compute_share: float
) -> list[tuple[float, float]]:
    """(start, end) of every operation.

    `together` is the speed of each drive lane while both are at work, `drive_share` theirs while there is compute, and
    `compute_share` that of compute while one of them is at work.
    """
    missing = [len(op.after) for op in ops]
    users: list[list[int]] = [[] for _ in ops]
    for place, op in enumerate(ops):
        for before in op.after:
            users[before].append(place)
    ready: dict[str, list[int]] = {lane: [] for lane in LANES}
    for place, op in enumerate(ops):
        if not missing[place]:
            ready[op.lane].append(place)  # in order, so already a heap
    active: dict[str, int] = {}
    left: dict[str, float] = {}
    started, spans, now = [0.0] * len(ops), [(0.0, 0.0)] * len(ops), 0.0
    while True:
        for lane, heap in ready.items():
            if heap and lane not in active:
                place = active[lane] = heapq.heappop(heap)
                left[lane], started[place] = seconds[place], now
        if not active:
            return spans
        speed = dict.fromkeys(active, 1.0)
        moving = [lane for lane in active if lane.startswith("nvme")]
        for lane in moving:
            speed[lane] = (together if len(moving) == 2 else 1.0) * (drive_share if "compute" in active else 1.0)
        if moving and "compute" in active:
            speed["compute"] = compute_share
        passed = min(left[lane] / speed[lane] for lane in active)
        now += passed
        for lane in list(active):
            left[lane] -= passed * speed[lane]
            if left[lane] <= 1e-12 * now:
                place = active.pop(lane)
                spans[place] = (started[place], now)
                for user in users[place]:
                    missing[user] -= 1
                    if not missing[user]:
                        heapq.heappush(ready[ops[user].lane], user)


def write_timeline(simulation: Simulation, path: Path) -> None:
    """The played steps in the Chrome/Perfetto trace format, in the lanes of a run's trace.json."""
    events: list[dict[str, object]] = [
        {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "rank 0, simulated"}}
    ]
    for tid, lane in enumerate(LANES):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": tid, "args": {"name": lane}})
    for op, (start, end) in zip(simulation.ops, simulation.spans, strict=True):
        span: dict[str, object] = {"name": op.name, "ph": "X", "pid": 0, "tid": LANES.index(op.lane)}
        span |= {"ts": start * 1e6, "dur": (end - start) * 1e6}
        if op.rate not in ("matmul", "adamw", "cpu adamw"):
            span["args"] = {"bytes": round(op.amount)}
        events.append(span)
    write_durably(path, json.dumps({"traceEvents": events}))
