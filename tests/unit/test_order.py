"""No two touches of a page go unordered on an accelerator; and every wait is needed for that."""

from __future__ import annotations

import os
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
from wait_sites import places_of_waits
from zinf_cli.checkpoint.folder import step_folder
from zinf_cli.engine.compute.activations import Activations
from zinf_cli.engine.compute.survey import survey
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.options import EngineOptions, open_tiers
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.engine.traffic.visit import Kind, Visit
from zinf_cli.engine.units.origins import pack
from zinf_cli.model_state import PAGE
from zinf_cli.models.checkpoint_reader import CheckpointReader
from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.nvme import NvmeTier
from zinf_cli.tiers.streams import streams_of
from zinf_cli.tiers.tier import Extent
from zinf_cli.trace import Trace
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


class Clamped(Wide):
    """Its forward clamps a weight: the slot's copy, while the update before may still write that home."""

    def forward(self, x: torch.Tensor) -> Any:
        self.up.weight.data.clamp_(-0.05, 0.05)
        return super().forward(x)


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
    frozen: bool = False
    """Whether its first block is not trained."""
    packed: bool = False
    """Whether its third block is not trained, and lies packed."""
    kind: type[Block] = Wide
    """Of the model's blocks."""
    ranks: int = 1
    chunk_numel: int = 2048
    threads: int = 1
    """Of a drive in each direction. With one, jobs begin in one order, and a run is the same each time."""

    def joined(self) -> Ranks:
        return Twin() if self.ranks == 2 else Ranks()

    def options(self, folder: Path, units: int) -> EngineOptions:
        names = {"d": "device", "c": "cpu", "n": "nvme"}
        params, grads, optimizer, activations = (names[letter] for letter in self.tiers)
        return EngineOptions(
            params=params, grads=grads, optimizer=optimizer, activations=activations,
            cached_units=frozenset(range(0, units, 2) if self.cached else ()),
            cached_states=frozenset(("params", "grads", "optimizer") if self.cached else ()),
            cache_tier="cpu" if "n" in self.tiers else "device",
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
    "cpu, speculative, some on the device": Way("cccd", "speculative", cached=True),
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
    "parameters on the device, few buffers": Way("dccc", few=True),
    "cpu, two ranks": Way("cccc", ranks=2),
    "nvme, two ranks, speculative": Way("nnnn", "speculative", ranks=2, narrow=True),
    "device, two ranks": Way("dddd", ranks=2, per_sweep=1),
    "cpu, two ranks, few buffers": Way("cccc", ranks=2, few=True),
    "cpu, clamped": Way("cccc", kind=Clamped),
    "cpu, packed, few buffers": Way("cccc", packed=True, few=True, narrow=True),
    "nvme, packed, two ranks": Way("nncc", packed=True, ranks=2),
    "device, packed": Way("dddd", packed=True),
}


def open_way(way: Way, folder: Path) -> Engine:
    """An engine with a model of five blocks."""
    torch.manual_seed(5)
    dtype = torch.bfloat16 if way.narrow else torch.float32
    model = on_meta(Blocks(way.kind, 5).to(dtype))
    model.get_submodule("layers.0").requires_grad_(not way.frozen)
    if way.packed:
        for module in model.get_submodule("layers.2").requires_grad_(requires_grad=False).modules():
            if isinstance(module, nn.Linear):
                pack(module, "weight", "nf4")
    ranks = way.joined()
    seen = survey(model, partial(model, torch.zeros((3, WIDTH), device="meta", dtype=dtype)), ranks.world_size)
    shapes = {name: param.shape for name, param in model.named_parameters()}
    engine = Engine(
        model,
        seen.units,
        replace(way.options(folder, len(seen.units)), spared=seen.spared),
        ranks,
        order=seen.order,
        written=seen.written,
        notice=lambda line: None,
    )
    engine.load(lambda names: {name: torch.randn(shapes[name]) * 0.1 for name in names})
    return engine


def work_of(way: Way, engine: Engine, step: int) -> list[MicroBatch]:
    dtype = torch.bfloat16 if way.narrow else torch.float32
    weight = (1e6 if step == CLIPPED else 1.0) / COUNT
    return [MicroBatch(partial(engine.model, make_batch(step, n).to(dtype)), weight, n) for n in range(COUNT)]


def train(way: Way, folder: Path, *, save: bool) -> None:
    """A few steps: two that are not clipped, one that is updated speculatively, one that is clipped, one more."""
    engine = open_way(way, folder)
    writer = CheckpointWriter(folder, engine, way.joined(), lambda: iter([]), None, lambda line: None)
    eager = way.how == "eager"
    for step in range(STEPS):
        work = work_of(way, engine, step)
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


class Regions:
    """A StateSink on a drive, which takes any pieces: a checkpoint's file takes those of 4 MiB."""

    def __init__(self, folder: Path) -> None:
        self.tier = NvmeTier([folder], Trace(), readers=1, writers=1)

    def region(self, unit: str, flat: int, field: str) -> Extent:
        return self.tier.allocate(8 * PAGE, field)

    def replaces(self, extent: Extent) -> bool:
        return False

    def holds(self, extent: Extent) -> bool:
        return extent.tier is self.tier

    def complete(self) -> None: ...

    def close(self) -> None: ...


def train_into_regions(way: Way, folder: Path) -> None:
    """Every step goes into a sink, in several chunks of each flat."""
    engine = open_way(way, folder)
    sinks = [Regions(folder) for _ in range(3)]
    for step, sink in enumerate(sinks):
        engine.train_step(work_of(way, engine, step), AdamW(1e-3), max_grad_norm=None, more=True, sink=sink)
    engine.flush()
    for sink in sinks:
        sink.tier.close()
    engine.close()


def save_behind_updates(way: Way, folder: Path) -> None:
    """What is not trained is copied through buffers that updates of the rest still use."""
    engine, sink = open_way(way, folder), Regions(folder)
    engine.train_step(work_of(way, engine, 0), AdamW(1e-3), max_grad_norm=None, eager=True, more=False)
    engine.save(sink)
    engine.close()
    sink.tier.close()


def begin_again(folder: Path) -> None:
    """A step is given up while a gradient is reduced, whose memory the next visits take."""
    engine = open_way(Way("cccc", ranks=2), folder)
    pipeline = engine._pipeline
    backward, *forward = Visit(0, Kind.BACKWARD), Visit(1, Kind.FORWARD), Visit(2, Kind.FORWARD)
    pipeline.acquire(backward)
    pipeline.release(backward)
    pipeline.abandon_step()
    pipeline.expect(forward)
    for visit in forward:
        pipeline.acquire(visit)
        pipeline.release(visit)
    engine.close()


def complete_late(folder: Path) -> None:
    """A gradient turns out to be complete: no further visit of the step comes to its unit."""
    engine = open_way(Way("cccc", ranks=2), folder)
    backward = Visit(0, Kind.BACKWARD)
    engine._pipeline.acquire(backward)
    engine._pipeline.release(backward)
    engine._pipeline.complete([backward.unit], [])
    engine.close()


def begin_with_another(folder: Path) -> None:
    """What was announced is dropped; from a drive comes a unit into the room of one that lies in CPU memory."""
    engine = open_way(Way("nnnd", cached=True, ranks=2), folder)
    pipeline = engine._pipeline
    pipeline.expect([Visit(2, Kind.FORWARD)])
    other = Visit(1, Kind.FORWARD)
    pipeline.acquire(other)
    pipeline.release(other)
    engine.close()


def train_parts(name: str, tier: str, folder: Path, ranks: Ranks | None = None, per_sweep: int | None = None) -> None:
    """A model in parts, whose layers' experts are units."""
    options = replace(everything_on(tier, folder), device=DEVICE, nvme_readers=1, nvme_writers=1)
    options = replace(options, micro_batches_per_sweep=per_sweep)
    engine_losses(open_engine(random_source(name), options, ranks, most=2000), 2)


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
    "every step into regions, device": partial(train_into_regions, Way("dddd", chunk_numel=1024)),
    "copied behind updates": partial(save_behind_updates, Way("cccc", "eager", frozen=True)),
    "a step begins again": begin_again,
    "another unit than was announced": begin_with_another,
    "a gradient is complete late": complete_late,
    "parts": partial(train_parts, "llama", "nvme"),
    "experts": partial(train_parts, "mixtral", "cpu"),
    "experts, two ranks, a sweep a micro-batch": partial(train_parts, "mixtral", "cpu", ranks=Twin(), per_sweep=1),
}


CHANCES = {"a step begins again": 0.0}
"""Of something under way to be over when it is asked, where that is not one half."""

NAMED = {
    "tiers/streams.py _Cuda.synchronize: torch.cuda.synchronize": "it is the seam",
    "tiers/streams.py _CudaStream.synchronize: event.record": "it is the seam",
    "tiers/streams.py _CudaStream.synchronize: event.synchronize": "it is the seam",
    "tiers/stopwatch.py EventStopwatch._recorded: event.record": "a time is taken, and nothing is ordered",
    "train/process_memory.py returning_free_memory.watch: over.wait": "a thread that looks now and then",
}
"""Places that wait and touch no page, with the reason."""


def run(case: str, removed: str | None = None, chance: float = 0.5, seed: int = 0) -> Checker:
    """What is found where the wait `removed` orders nothing."""
    checker = Checker(removed, chance=CHANCES.get(case, chance), seed=seed)
    with TemporaryDirectory() as folder, checking(checker):
        CASES[case](Path(folder))
    return checker


clean = cache(run)


def test_memory_of_the_allocator_is_used_on_the_stream_that_has_taken_it() -> None:
    """What is freed there may be taken again at once, while another stream still uses it."""
    checker = Checker()
    with checking(checker):
        streams = streams_of(DEVICE)
        beside = streams.new(DEVICE)
        of_compute = torch.ones(4)
        with streams.use(beside):
            taken_there = torch.ones(4).add_(1)
        of_compute.add_(1)
        assert not checker.races
        taken_there.add_(of_compute)
        with streams.use(beside):
            of_compute.sub_(1)
        assert {what.split()[0] for _, what in checker.races} == {"aten::add_", "aten::sub_"}


@pytest.mark.parametrize("case", ["cpu, two ranks", "device, two ranks"])
def test_gathers_run_beside_compute(case: str) -> None:
    """They do not wait for all that compute has queued, nor this thread for their reads."""
    assert run(case, chance=0.0).gathers_beside_compute


@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore")  # of models, about their configurations
def test_nothing_races_and_every_wait_is_needed_for_that() -> None:
    """Each place of the source that waits is reached. Without it, some case has a race: make test tries every third.

    A race is likeliest where the wait tells something new most often, so such cases come first. It is one test, because
    what it finds of the whole code serves for all waits.
    """
    assert {case: list(clean(case).races.values()) for case in CASES if clean(case).races} == {}
    sites: dict[str, list[str]] = {}
    for case in CASES:
        for site in clean(case).waits:
            sites.setdefault(site, []).append(case)
    for site, cases in sites.items():
        cases.sort(key=partial(_rarely_tells, site))
    places = places_of_waits()
    assert not [site for site in sites if not any(place.covers(site) for place in places)], "the source has more waits"
    assert {str(place) for place in places if not any(map(place.covers, sites))} == NAMED.keys()
    # Drives' threads run as they like: what no case has shown is tried with other answers of what is under way.
    tried = list(sites)[:: 1 if "ZINF_TEST_ALL" in os.environ else 3]
    assert [s for s in tried if any(run(c, s, seed=n).races for n in range(4) for c in sites[s])] == tried


def _rarely_tells(site: str, case: str) -> float:
    return -clean(case).waits[site] / max(1, clean(case).launches)
