"""No two touches of a page go unordered on an accelerator; and every wait is needed for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import nn

from accelerator_on_cpu import Twin, checking
from blocks import MIB, WIDTH, Block, Blocks, on_meta
from happens_before import DEVICE, Checker
from plain import engine_losses, everything_on, open_engine
from tiny_models import random_source
from zinf_cli.checkpoint.folder import step_folder
from zinf_cli.engine.compute.activations import Activations
from zinf_cli.engine.compute.survey import survey
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.options import EngineOptions, open_tiers
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.model_state import PAGE
from zinf_cli.tiers.arena import Arena
from zinf_cli.trace import Trace
from zinf_cli.train.checkpoint_reader import CheckpointReader
from zinf_cli.train.checkpoint_writer import CheckpointWriter, Position

STEPS, COUNT = 5, 2
CLIPPED = 3
"""The step whose gradient is clipped, after one that was updated speculatively and committed."""


def make_batch(step: int, number: int) -> torch.Tensor:
    """So large that it goes to the tier of activations."""
    return torch.randn((40, WIDTH), generator=torch.Generator().manual_seed(10 * step + number))


class Wide(Block):
    """A few chunks of an update."""

    def begin(self) -> None:
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.down(torch.tanh(self.up(self.linear(x))))


@dataclass(frozen=True)
class Way:
    """How the engine runs."""

    tiers: str
    """Of params, grads, optimizer and activations, by their first letters."""
    how: str = "deferred"
    per_sweep: int | None = None
    keep: bool = False
    few: bool = False
    cached: bool = False
    narrow: bool = False
    ranks: int = 1
    chunk_numel: int = 2048
    threads: int = 1
    """Of a drive in each direction. With one, jobs begin in one order, and a run is the same each time."""

    def options(self, folder: Path, units: int) -> EngineOptions:
        names = {"d": "device", "c": "cpu", "n": "nvme"}
        params, grads, optimizer, activations = (names[letter] for letter in self.tiers)
        return EngineOptions(
            params=params, grads=grads, optimizer=optimizer, activations=activations,
            cached_units=frozenset(range(0, units, 2) if self.cached else ()),
            cached_states=frozenset(("params", "grads", "optimizer") if self.cached else ()),
            nvme_folders=(folder,), nvme_bytes=8 * MIB, nvme_readers=self.threads, nvme_writers=self.threads,
            slot_bytes=24 * 4096 if self.few else MIB, resident_bytes=MIB, chunk_numel=self.chunk_numel,
            num_chunks=5 if self.few else 16, staging_bytes=8 * 4096 if self.few else MIB,
            device=DEVICE, micro_batches_per_sweep=self.per_sweep,
            kept_units=frozenset(range(units) if self.keep else ()), speculate=self.how == "speculative",
        )  # fmt: skip


WAYS = {
    "device": Way("dddd"),
    "cpu": Way("cccc"),
    "cpu, eager": Way("cccc", "eager"),
    "cpu, speculative": Way("cccc", "speculative"),
    "cpu, speculative, 16 bit, few buffers": Way("cccc", "speculative", narrow=True, few=True),
    "cpu, 16 bit, few buffers": Way("cccc", narrow=True, few=True),
    "cpu, a sweep a micro-batch": Way("cccc", per_sweep=1),
    "cpu, activations kept": Way("cccc", keep=True),
    "nvme": Way("nnnn"),
    "nvme, more threads": Way("nnnn", threads=3),
    "nvme, eager": Way("nnnn", "eager", few=True),
    "nvme, speculative": Way("nnnn", "speculative"),
    "nvme, speculative, few buffers": Way("nnnn", "speculative", few=True, narrow=True),
    "nvme, speculative, cached": Way("nnnd", "speculative", cached=True),
    "nvme, activations kept, few buffers": Way("nnnn", keep=True, few=True),
    "nvme, a sweep a micro-batch": Way("nnnn", per_sweep=1, few=True),
    "optimizer on nvme": Way("dcnc"),
    "parameters on nvme": Way("ndcn"),
    "cpu, two ranks": Way("cccc", ranks=2),
    "nvme, two ranks, speculative": Way("nnnn", "speculative", ranks=2, narrow=True),
    "device, two ranks": Way("dddd", ranks=2, per_sweep=1),
}


def train(way: Way, folder: Path, *, save: bool) -> None:
    """A few steps: two that are not clipped, one that is updated speculatively, one that is clipped, one more."""
    torch.manual_seed(5)
    dtype = torch.bfloat16 if way.narrow else torch.float32
    model = on_meta(Blocks(Wide, 5).to(dtype))
    ranks: Ranks = Twin() if way.ranks == 2 else Ranks()
    seen = survey(model, partial(model, torch.zeros((3, WIDTH), device="meta", dtype=dtype)), ranks.world_size)
    shapes = {name: param.shape for name, param in model.named_parameters()}
    engine = Engine(
        model, seen.units, way.options(folder, len(seen.units)), ranks, order=seen.order, notice=lambda line: None
    )
    engine.load(lambda names: {name: torch.randn(shapes[name]) * 0.1 for name in names})
    writer = CheckpointWriter(folder, engine, ranks, lambda: iter([]), None, lambda line: None)
    eager = way.how == "eager"
    for step in range(STEPS):
        weight = (1e6 if step == CLIPPED else 1.0) / COUNT
        work = [MicroBatch(partial(model, make_batch(step, n).to(dtype)), weight, n) for n in range(COUNT)]
        engine.train_step(
            work,
            AdamW(1e-3),
            max_grad_norm=None if eager else 1e4,
            eager=eager,
            more=step + 1 < STEPS,
            sink=writer.begin(step + 1) if save else None,
        )
        if save:
            writer.complete(Position(step + 1, "fp32", COUNT, "text", None, {}))
            writer.advance()
    engine.evaluate(work[:1])
    engine.flush()
    if save:
        writer.write(Position(STEPS + 1, "fp32", COUNT, "text", None, {}))
        reader = CheckpointReader(step_folder(folder, STEPS))
        engine.load_state(reader)
        reader.close()
        engine.train_step(work, AdamW(1e-3), eager=eager, max_grad_norm=None)
        engine.flush()
    writer.close()
    engine.close()


def train_parts(name: str, tier: str, folder: Path) -> None:
    """A model in parts, whose layers' experts are units."""
    options = replace(everything_on(tier, folder), device=DEVICE, nvme_readers=1, nvme_writers=1)
    engine_losses(open_engine(random_source(name), options, most=2000), 2)


def drop_activations(tier: str, folder: Path) -> None:
    """What is read ahead and not used, as when a step begins again; and a tensor that is never read."""
    home = Way(tier * 4).options(folder, 0)
    (opened,) = open_tiers(home, Trace(), 0, lambda line: None).values()
    activations = Activations(opened, Arena(8 * PAGE, DEVICE), lambda transfer: transfer.wait())
    for number in range(12):
        saved = activations.save(torch.full((PAGE,), number, dtype=torch.uint8), "dropped")
        if number % 2:
            saved.prefetch()
        saved.free()
    opened.close()


Doing = Callable[[Path], None]
CASES: dict[str, Doing] = {
    "activations dropped, cpu": partial(drop_activations, "c"),
    "activations dropped, nvme": partial(drop_activations, "n"),
    **{name: partial(train, way, save=False) for name, way in WAYS.items()},
    "checkpoints, cpu": partial(train, Way("cccc", chunk_numel=8192), save=True),
    "checkpoints, device": partial(train, Way("dddd", chunk_numel=8192), save=True),
    "checkpoints, nvme": partial(train, Way("nnnn", few=True, narrow=True, chunk_numel=8192), save=True),
    "checkpoints, speculative": partial(train, Way("nnnn", "speculative", chunk_numel=8192), save=True),
    "parts": partial(train_parts, "llama", "nvme"),
    "experts": partial(train_parts, "mixtral", "cpu"),
}


def run(case: str, removed: str | None = None) -> Checker:
    """What is found where the wait `removed` orders nothing."""
    checker = Checker(removed=removed)
    with TemporaryDirectory() as folder, checking(checker):
        CASES[case](Path(folder))
    return checker


clean = cache(run)


NOT_SHOWN = "ChunkUpdate._send"
"""Needed by a flat of several pieces of 4 MiB that lies in memory of the device and goes into two checkpoints in a row.
That takes too long here."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")  # of models, about their configurations
def test_nothing_races(case: str) -> None:
    assert list(clean(case).races.values()) == []


@pytest.mark.filterwarnings("ignore")
def test_every_wait_is_needed() -> None:
    """Without any single one of the waits that the cases come to, some case has a race."""
    cases: dict[str, list[str]] = {}
    for case in CASES:
        for site in clean(case).waits:
            cases.setdefault(site, []).append(case)
    needless = [
        site
        for site, found in cases.items()
        if not site.endswith(NOT_SHOWN) and not any(run(case, removed=site).races for case in found)
    ]
    assert not needless
    assert len(cases) > 20
