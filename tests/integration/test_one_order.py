"""Gathers and reductions begin in one order on all ranks, as NCCL needs, whatever each rank's drives do.

Here they run over gloo. Each kind has a group of its own, so another order would be seen and not hang.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from own_processes import as_ranks
from plain import (
    CLIP,
    engine_losses,
    every_other_unit_cached,
    everything_on,
    open_engine,
    plain_losses,
    relative_difference,
)
from tiny_models import random_source
from zinf_cli.engine.ranks import Flags, Least, Ranks
from zinf_cli.tiers import nvme
from zinf_cli.tiers.tier import Transfer
from zinf_cli.trace import Trace

DEVICE = torch.device("cpu:0")
STEPS = 4
Found = tuple[list[list[float]], list[str]]


@dataclass(frozen=True)
class Logged(Ranks):
    """Ranks that note which collectives they begin."""

    begun: list[str] = field(default_factory=list)

    def gather(self, flat: torch.Tensor, own_slice: torch.Tensor, trace: Trace, label: str) -> Transfer:
        self.begun.append(f"gather {label}")
        return super().gather(flat, own_slice, trace, label)

    def reduce_scatter(self, flat: torch.Tensor, trace: Trace, label: str) -> Transfer:
        self.begun.append(f"reduce {label}")
        return super().reduce_scatter(flat, trace, label)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.begun.append(f"sum {values.numel()}")
        return super().sum(values)

    def any(self, flags: Sequence[bool]) -> Flags:
        self.begun.append(f"any {len(flags)}")
        return super().any(flags)

    def least(self, number: int) -> Least:
        self.begun.append("least")
        return super().least(number)


def uneven(rank: int) -> Callable[[Any], bool]:
    """A rank whose reads are seen to be done at moments of its own."""
    coin, done = random.Random(rank), nvme._Job.done
    return lambda job: coin.random() < 0.3 and done(job)


def of_rank(ranks: Ranks, name: str, tier: str, more: dict[str, Any], settings: dict[str, Any], folder: Path) -> Found:
    """`more` may have options of the engine, and whether every other unit is cached."""
    logged = Logged(
        ranks.rank, ranks.world_size, True, ranks.gather_group, ranks.reduce_group, ranks.control_group
    )  # fmt: skip
    changes = {name: more[name] for name in ("speculate", "micro_batches_per_sweep") if name in more}
    options = replace(everything_on(tier, folder / f"rank-{ranks.rank}"), device=DEVICE, **changes)
    if more.get("cached"):
        options = every_other_unit_cached(options)
    more = {name: value for name, value in more.items() if name in ("room", "most", "slot_bytes")}
    with patch.object(nvme._Job, "done", uneven(ranks.rank)):
        engine = open_engine(random_source(name), options, logged, **more)
        losses = engine_losses(
            engine, STEPS, count=4, rank=ranks.rank, world_size=2, device=DEVICE, evaluate_every=1, **settings
        )
    return losses, logged.begun


def gathered_ahead(begun: list[str]) -> bool:
    """Whether some gather begins between that of another visit and the reduction of its gradient."""
    gathered: dict[str, int] = {}
    begun = [what for what in begun if what.startswith(("gather", "reduce"))]
    for place, (kind, unit) in enumerate(what.split(" ", 1) for what in begun):
        if kind == "gather":
            gathered[unit] = place
        elif unit != "resident" and any(what.startswith("gather") for what in begun[gathered[unit] + 1 : place]):
            return True
    return False


@pytest.mark.parametrize(
    ("name", "tier", "more", "settings"),
    [
        ("llama", "nvme", {}, {}),
        ("llama", "cpu", {}, {}),
        ("llama", "nvme", {"room": 4}, {"clip": None, "eager": True}),
        ("qwen3_moe", "nvme", {"most": 2000}, {}),
        ("llama", "nvme", {"most": 2000}, {}),
        ("llama", "nvme", {"cached": True, "room": 4}, {}),
        ("llama", "nvme", {"speculate": True}, {"clip": 50.0}),
        ("qwen3_moe", "cpu", {"most": 2000, "micro_batches_per_sweep": 1}, {"clip": None, "eager": True}),
    ],
    ids=["deferred", "memory", "eager", "experts", "parts", "cached", "speculative", "experts, eager, several sweeps"],
)
def test_ranks_begin_the_same_collectives_in_the_same_order(
    name: str, tier: str, more: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    (losses, begun), (others, begun_by_other) = as_ranks(2, of_rank, name, tier, more, settings, tmp_path)
    assert begun == begun_by_other
    together = [first + second for first, second in zip(losses, others, strict=True)]
    expected = plain_losses(random_source(name), STEPS, count=4, clip=settings.get("clip", CLIP))
    assert relative_difference(together, expected) < 1e-5
    assert gathered_ahead(begun), begun
