"""The plan as data: where every byte of a run lies, what that leaves, and what bounds a step.

`search.py` makes one; the launcher hands it to ranks as `plan.json`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zinf_cli.checkpoint.reading import patiently
from zinf_cli.plan.buffers import Working
from zinf_cli.plan.io import Io
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.memory import Choice
from zinf_cli.recipe.hosts import Host


@dataclass(frozen=True)
class Line:
    """Bytes of one kind on one tier, per rank. `what` is a key of NAMES (memory.py)."""

    tier: str
    what: str
    num_bytes: int


@dataclass(frozen=True)
class Limit:
    """A tier of a host, or of one accelerator (device): bytes that the run takes there, and bytes that it may take."""

    tier: str
    needed: int
    allowed: int
    origin: str
    """Who sets the limit: a recipe key, or a machine."""


@dataclass(frozen=True)
class CheckpointStep:
    """A step with a checkpoint. Bytes are of all ranks."""

    interval: int
    """Steps from one checkpoint to the next."""
    folder: str
    num_bytes: int
    """Bytes of the checkpoint."""
    traffic: int
    """Bytes written to its drive beside those that every step moves: see plan/traffic.py."""
    drive_shared: bool
    """Whether some of the NVMe tier lies on that drive."""
    step_s: float = 0.0
    """Expected seconds of such a step."""


@dataclass(frozen=True)
class SweepCost:
    """What it costs that a step takes several sweeps, beside the same placement with all micro-batches in one."""

    lacking: tuple[Limit, ...]
    """What one sweep would need, if that is too much; nothing if the recipe asks for several."""
    traffic: int
    """Bytes more to and from NVMe per step and rank."""
    step_s: float
    """Expected seconds more of a step."""


@dataclass(frozen=True)
class Plan:
    """Everything that a rank needs to know beside the recipe, and that a user wants to see before it starts."""

    hosts: tuple[Host, ...]
    world_size: int
    threads_per_rank: int
    precision: str
    placement: dict[str, str]
    micro_batches: int
    """Per rank and step."""
    per_sweep: int
    update: str
    """When a unit is updated: see Choice."""
    kept_units: tuple[int, ...]
    """Units whose activations are kept for backward. The others are recomputed."""
    staying_units: tuple[int, ...]
    """Units that leave their activations in memory of the compute device, whatever their tier."""
    cached_units: tuple[int, ...]
    cached_states: tuple[str, ...]
    """Classes that lie on a faster tier for the cached units: in CPU memory or on the device (`Choice.cache_tier`)."""
    sequences_per_step: int
    max_steps: int
    working: Working
    nvme_bytes: int
    """Per rank. Activations that exceed their estimate come on top."""
    nvme_folders: tuple[str, ...]
    lines: tuple[Line, ...]
    limits: tuple[Limit, ...]
    compute_s: float
    nvme_s: float
    """Expected seconds per step of compute alone, and of drive traffic alone."""
    nvme_traffic: int
    """Bytes read and written per step and rank."""
    nvme_written: int
    """Those of them that are written."""
    nvme_traffic_clipped: int
    """The same in a clipped step, where no update is made in backward."""
    figures: Figures
    step_s: float = 0.0
    """Expected seconds of a step, as simulated. Where updates are speculative: of a clipped step."""
    calm_step_s: float = 0.0
    """The same of an unclipped step. The name is that of the key in plan.json."""
    clips_worth: float = 0.5
    """Where updates are speculative: the share of steps that clip below which they pay."""
    bottleneck: str = "compute"
    """The resource that is busiest in a step."""
    busy: dict[str, float] = field(default_factory=dict)
    """The share of a step that each lane is busy."""
    io: Io = field(default_factory=Io)
    """Threads and blocks on the drives."""
    drives_measured: bool = False
    """Whether the drives' speed was measured on this machine."""
    endurance_bytes: float | None = None
    """What a host's drives may be written in their life, if the user gives it."""
    host_mtbf_s: float | None = None
    """Mean time between failures of a host, if the user gives it."""
    checkpoint: CheckpointStep | None = None
    """None where the run will write none."""
    sweep_cost: SweepCost | None = None
    """None if all micro-batches of a step pass the units together."""
    resume: str | None = None
    """The folder of the checkpoint that the run goes on from."""

    @property
    def fits(self) -> bool:
        """Whether no tier, and no drive of checkpoints, needs more than it may use."""
        return not self.short

    @property
    def short(self) -> tuple[Limit, ...]:
        """The limits of tiers, and of the drive of checkpoints, that need more than they may use."""
        return tuple(limit for limit in self.limits if limit.needed > limit.allowed)

    def over(self, tier: str) -> int:
        """Bytes that a host has too few on a tier; negative where some are left."""
        limit = next(limit for limit in self.limits if limit.tier == tier)
        return limit.needed - limit.allowed

    def room(self, tier: str, unsure: float = 0.0) -> int:
        """Bytes that are left for each rank on a tier, even if the plan is too low by a share `unsure`."""
        limit = next(limit for limit in self.limits if limit.tier == tier)
        return (limit.allowed - int(limit.needed * (1 + unsure))) // self.figures.ranks_at(tier)

    @property
    def collective_timeout_s(self) -> float:
        """Seconds after which a rank that waits for its peers fails: many steps, and never less than slow starts
        differ."""
        return max(600.0, 20 * (self.compute_s + self.nvme_s))

    @property
    def cpu_bytes_per_rank(self) -> int:
        """Bytes of CPU memory of one rank, without what a host has besides."""
        return sum(line.num_bytes for line in self.lines if line.tier == "cpu")

    @property
    def cpu_bytes_at_rest(self) -> int:
        """The same without the temporaries of compute."""
        return sum(line.num_bytes for line in self.lines if line.tier == "cpu" and line.what != "compute")

    @property
    def choice(self) -> Choice:
        """The placement that this plan was made for."""
        return Choice(
            self.placement,
            self.per_sweep,
            "device" if self.figures.machine.accelerators else "cpu",
            frozenset(self.kept_units),
            self.update,
            frozenset(self.cached_states),
            frozenset(self.cached_units),
            frozenset(self.staying_units),
        )

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json, which `load` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, path: Path) -> Plan:
        """The plan in a plan.json. UnreadableError if the drive does not give the file."""
        document = json.loads(patiently(path.read_text, path))
        document["hosts"] = tuple(Host(**{**host, "slots": tuple(host["slots"])}) for host in document["hosts"])
        document["working"] = Working(**document["working"])
        document["lines"] = tuple(Line(**line) for line in document["lines"])
        document["limits"] = tuple(Limit(**limit) for limit in document["limits"])
        for name in ("kept_units", "staying_units", "cached_units", "cached_states", "nvme_folders"):
            document[name] = tuple(document[name])
        document["io"] = Io(**document["io"])
        if document["checkpoint"] is not None:
            document["checkpoint"] = CheckpointStep(**document["checkpoint"])
        if (cost := document["sweep_cost"]) is not None:
            lacking = tuple(Limit(**limit) for limit in cost["lacking"])
            document["sweep_cost"] = SweepCost(lacking, cost["traffic"], cost["step_s"])
        document["figures"] = Figures.from_json(document["figures"])
        return cls(**document)
