"""Plays a step on a hardware profile: how long it takes, how busy each lane is, what bounds it.

A lane does one thing at a time. Among what is ready it takes what comes first in the schedule. The two lanes of a drive
slow each other down if it moves less in both directions at once than the sum of each alone. A drive and compute slow
each other down if the same cores serve both.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
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
"""What a user can buy more of, and the lanes that it makes faster."""


@dataclass(frozen=True)
class Cluster:
    """Equal hosts: how many, with how many ranks, and what a rank computes."""

    hosts: int
    ranks: int
    """On one host."""
    precision: str
    rows: float
    """Tokens of a micro-batch, which are the rows of its activations."""


@dataclass(frozen=True)
class Simulation:
    """One step in its steady state."""

    begin: float
    end: float
    """Seconds at which the last compute of the step before ends, and that of the step itself."""
    ops: Sequence[Op]
    spans: Sequence[tuple[float, float]]
    """(start, end) of every operation, in seconds."""

    @property
    def step_s(self) -> float:
        """Seconds of the step."""
        return self.end - self.begin

    @cached_property
    def busy(self) -> Mapping[str, float]:
        """The share of the step that each lane is busy."""
        busy = dict.fromkeys(LANES, 0.0)
        for op, (start, stop) in zip(self.ops, self.spans, strict=True):
            busy[op.lane] += max(0.0, min(stop, self.end) - max(start, self.begin)) / self.step_s
        return busy

    @property
    def bottleneck(self) -> str:
        """The resource that is busiest."""
        return max(RESOURCES, key=lambda name: max(self.busy[lane] for lane in RESOURCES[name]))

    @property
    def waiting(self) -> float:
        """The share of the step that compute waits for data."""
        return max(0.0, 1 - self.busy["compute"])


def rates_of(profile: Profile, cluster: Cluster) -> dict[str, float]:
    """The speed of each lane of one rank while all ranks are at work, in the units of `Op.amount` per second.

    "both" is the drive's speed while it reads and writes, in sum. "drive share" and "compute share" are the shares of
    their speed that the drive and compute keep while both are at work.
    """
    ranks, drives = cluster.ranks, profile.drives
    network = profile.collective_across if cluster.hosts > 1 else profile.collective_inside
    share = 1 if profile.accelerators else ranks
    on_device = profile.device_bandwidth / ADAMW_BYTES if profile.accelerators else profile.adamw / ranks
    return {
        "matmul": profile.flops(cluster.precision, cluster.rows) / share,
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


def simulate(step: Step, profile: Profile, cluster: Cluster) -> Simulation:
    """Play zinf's schedule of `step` on hosts of that profile."""
    return play(*sweep_steps(step), rates_of(profile, cluster))


def at_least(step: Step, profile: Profile, cluster: Cluster) -> float:
    """Seconds of a step if no operation waits for another: each lane has its work, and those that meet slow down.

    A step that is played takes as long, but for what it leaves the next one to do, or longer. This is a tenth of the
    work of playing it.
    """
    rates = rates_of(profile, cluster)
    work = dict.fromkeys(LANES, 0.0)
    for op in sweep_steps(step, count=1)[0]:
        work[op.lane] += op.amount / rates[op.rate]
    ways = work.pop("nvme read"), work.pop("nvme write")
    drives = _side_by_side(*ways, *[_together(rates)] * 2)
    compute = work.pop("compute")
    return max(*work.values(), _side_by_side(drives, compute, rates["drive share"], rates["compute share"]))


def _side_by_side(one: float, other: float, share: float, other_share: float) -> float:
    """Seconds of two works, which take `one` and `other` alone and keep shares of their speed while both are."""
    gain = share + other_share - 1  # of each second that both are at work
    return one + other - max(0.0, gain) * min(one / share, other / other_share)


def _together(rates: Mapping[str, float]) -> float:
    """The share of its speed that a lane of the drive keeps while the other is at work."""
    return min(1.0, rates["both"] / (rates["nvme read"] + rates["nvme write"]))


def play(ops: Sequence[Op], ends: Sequence[int], rates: Mapping[str, float]) -> Simulation:
    """Play `ops` at `rates` (see `rates_of`). The step is what lies between the last two of `ends`."""
    seconds = [op.amount / rates[op.rate] for op in ops]
    spans = _play(ops, seconds, _together(rates), rates["drive share"], rates["compute share"])
    begin, end = (spans[place][1] for place in ends[-2:])
    return Simulation(begin, end, ops, spans)


def _play(
    ops: Sequence[Op], seconds: Sequence[float], together: float, drive_share: float, compute_share: float
) -> list[tuple[float, float]]:
    """(start, end) of every operation, in seconds.

    The shares say how much of its speed a lane keeps: `together` a lane of the drive while the other is at work,
    `drive_share` a lane of the drive while compute is, and `compute_share` compute while a lane of the drive is.
    """
    lanes = [lane for lane in LANES if any(op.lane == lane for op in ops)]
    lane_of = [lanes.index(op.lane) for op in ops]
    missing = [len(op.after) for op in ops]
    users: list[list[int]] = [[] for _ in ops]
    ready: list[list[int]] = [[] for _ in lanes]
    for place, op in enumerate(ops):
        for before in op.after:
            users[before].append(place)
        if not op.after:
            ready[lane_of[place]].append(place)  # in order, so already a heap

    @cache
    def speeds(active: tuple[int, ...]) -> list[float]:
        names = {lanes[lane] for lane in active}
        moving, computes = {"nvme read", "nvme write"} & names, "compute" in names
        drive = (together if len(moving) == 2 else 1.0) * (drive_share if computes else 1.0)
        other = {"compute": compute_share if moving else 1.0, "nvme read": drive, "nvme write": drive}
        return [other.get(lane, 1.0) for lane in lanes]

    work, left = [-1] * len(lanes), [0.0] * len(lanes)  # what each lane does; -1 for nothing
    started, spans, now = [0.0] * len(ops), [(0.0, 0.0)] * len(ops), 0.0
    while True:
        for lane, heap in enumerate(ready):
            if heap and work[lane] < 0:
                place = work[lane] = heapq.heappop(heap)
                left[lane], started[place] = seconds[place], now
        active = tuple([lane for lane, place in enumerate(work) if place >= 0])
        if not active:
            return spans
        speed = speeds(active)
        passed = min([left[lane] / speed[lane] for lane in active])
        now += passed
        for lane in active:
            left[lane] -= passed * speed[lane]
            if left[lane] <= 1e-12 * now:
                place, work[lane] = work[lane], -1
                spans[place] = (started[place], now)
                for user in users[place]:
                    missing[user] -= 1
                    if not missing[user]:
                        heapq.heappush(ready[lane_of[user]], user)


def write_timeline(simulation: Simulation, path: Path) -> None:
    """Write the played steps as a Chrome/Perfetto trace, with the lanes of a run's trace.json."""
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
