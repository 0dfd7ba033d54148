"""A step that is abandoned: what is under way then."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from plain import everything_on, open_engine
from tiny_models import random_source
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.pipeline import Pipeline
from zinf_cli.engine.traffic.visit import Kind, Visit
from zinf_cli.engine.units.life import State
from zinf_cli.tiers.tier import Transfer
from zinf_cli.trace import Trace


class Late:
    """A reduction that is done when somebody waits for it."""

    what = "reduce"
    event = None

    def __init__(self) -> None:
        self._waited = False

    def done(self) -> bool:
        return self._waited

    def wait(self) -> None:
        self._waited = True


@dataclass(frozen=True)
class FastPeer(Ranks):
    """Another rank is ahead: it has started one gather more."""

    def all(self, number: int) -> list[int]:
        return [number, number + 1]

    def reduce_scatter(self, flat: torch.Tensor, trace: Trace, label: str) -> Transfer:
        return Late()


def test_a_gather_that_a_peer_has_started_gets_the_gradient_it_waits_for(tmp_path: Path) -> None:
    """The peer has seen the end of a reduction, and has begun the visit that adds to its gradient."""
    engine = open_engine(random_source("llama"), everything_on("nvme", tmp_path))
    unit = engine.units[1]
    pipeline = Pipeline(engine.units, FastPeer(), engine.memory, engine.trace)
    first = Visit(1, Kind.BACKWARD)
    pipeline.expect([first, Visit(1, Kind.BACKWARD, nth=1)])
    pipeline.acquire(first)
    pipeline.release(first)
    assert not unit.life.readable(1)
    pipeline.abandon_step()
    pipeline.settle()
    assert pipeline.idle
    assert engine.memory.slots.used == 0
    pipeline.begin_step()
    assert unit.life.state is State.CLEAN
    engine.close()
