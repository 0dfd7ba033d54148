"""`python -m benchmarks.virtual`: a step of an 8B llama on an H100, in virtual time.

It plays zinf's own engine, with its real units, fetches, updates, tape and sweep, on lanes with given rates (lanes.py).
Each kernel and copy takes what its FLOPs or bytes take (priced.py), and none is computed. The plan is the one that zinf
makes for such a machine. What the run can't tell: how fast kernels are, what Python takes beside launches, and whether
the order is right.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.case import Case
from benchmarks.lanes import IN, KERNELS, OUT, Lanes, Rates
from benchmarks.priced import DEVICE, Memory, Priced, norms_in_one_kernel, products_added_up
from benchmarks.results import add_save, report
from zinf_cli.bench.block import Block, pass_over
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.machine.profiles import BUILT_IN, Profile
from zinf_cli.plan.layout import DataFigures, Figures, MachineFigures
from zinf_cli.plan.memory import CLASSES
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.search import best_plan
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.tiers import streams
from zinf_cli.tiers.arena import Arena
from zinf_cli.trace import Trace
from zinf_cli.train.figures import model_figures
from zinf_cli.train.open_engine import open_engine
from zinf_cli.train.setup import model_loss, open_model
from zinf_cli.train.surveyed import prepare

NOMINAL = 989e12
"""FLOP/s of an H100's matrix products in bf16, as its datasheet has them."""
WARM_UP = 3
"""Steps before the one that counts: after two that did not clip, the third is the first with speculative updates."""
GIB = 2**30


@dataclass(frozen=True)
class Played:
    """One step in virtual time."""

    step_s: float
    launches: Mapping[str, int]
    busy: Mapping[str, float]
    """Seconds, by lane."""
    kernels: Mapping[str, float]
    """Seconds, by name of the kernel."""
    waited: Mapping[str, float]
    """Seconds that the host waited, by who did."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, help="of the model, instead of its own")
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--model", default="8B")
    parser.add_argument("--no-clipping", action="store_true")
    parser.add_argument("--auto", action="store_true", help="leave it to the plan where state lies")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="of the recipe")
    add_save(parser)
    given = parser.parse_args()
    case = Case(given.micro_batches, given.tokens, given.model, clip=None if given.no_clipping else 1.0)
    config = {**case.config, **({} if given.layers is None else {"num_hidden_layers": given.layers})}
    placed = {f"offload.{state}": "auto" for state in CLASSES} if given.auto else {}
    recipe = recipe_of(config, case, {**placed, **dict(pair.split("=") for pair in given.set)})
    plan = plan_for(recipe)
    rates = Rates()
    played = play(recipe, plan, rates)
    flops = plan.figures.model.flops_per_token * case.tokens * case.micro_batches
    report(
        f"{case}, {'auto, ' if given.auto else ''}H100 in virtual time",
        [row(played, flops, rates)],
        given.save,
        measured=measured(plan, played),
    )
    for name, seconds in sorted(played.waited.items(), key=lambda pair: -pair[1])[:8]:
        print(f"the host waited {seconds:.3f} s: {name}")
    for name, seconds in sorted(played.kernels.items(), key=lambda pair: -pair[1])[:16]:
        print(f"{seconds:.3f} s in {played.launches[name]} launches of {name}")


def row(played: Played, flops: float, rates: Rates) -> dict[str, Any]:
    """The figures of a step of `flops` FLOPs, recomputation left out."""
    speed = flops / played.step_s
    return {
        "step_s": played.step_s,
        "MFU_share": speed / NOMINAL,
        "of_matmul_share": speed / rates.matmul,
        "launches": sum(played.launches.values()),
        **{
            f"{lane.replace(' ', '_')}_share": played.busy.get(lane, 0.0) / played.step_s for lane in (KERNELS, IN, OUT)
        },
        "host_waits_share": sum(played.waited.values()) / played.step_s,
    }


def measured(plan: Plan, played: Played) -> dict[str, Any]:
    """What else a file of results has."""
    planned = {"placement": plan.placement, "update": plan.update, "kept_units": len(plan.kept_units),
               "per_sweep": plan.per_sweep, "chunk_numel": plan.working.chunk_numel,
               "num_chunks": plan.working.num_chunks, "slot_bytes": plan.working.slot_bytes,
               "cached_units": len(plan.cached_units), "calm_step_s": plan.calm_step_s,
               "device_bytes": next(limit.needed for limit in plan.limits if limit.tier == "device")}  # fmt: skip
    return {"plan": planned, "launches": dict(played.launches), "busy": dict(played.busy),
            "kernels": dict(played.kernels), "waited": dict(played.waited)}  # fmt: skip


def recipe_of(config: Mapping[str, Any], case: Case, more: Mapping[str, str]) -> Recipe:
    """The recipe of a case, with the state of parameters, gradients and optimizer in CPU memory."""
    tree: dict[str, Any] = {
        "model": {"config": dict(config)},
        "dataset": {"path": str(Path(__file__))},  # it is not read
        "train": {"seq_len": case.tokens, "gradient_accumulation_steps": case.micro_batches, "max_steps": 8,
                  "precision": "bf16", "max_grad_norm": case.clip},
        "offload": {"params": "cpu", "grads": "cpu", "optimizer": "cpu"},
    }  # fmt: skip
    for key, value in more.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return Recipe.model_validate(tree)


def plan_for(recipe: Recipe, device_bytes: int = 79 * GIB, cpu_bytes: int = 512 * GIB) -> Plan:
    """zinf's plan for a machine with one H100."""
    model = open_model(recipe, "bf16")
    found = model_figures(model, prepare(model, recipe, 1, None), recipe)
    machine = MachineFigures(1, device_bytes, 26, Rates().matmul, 4 * GIB, GIB, "H100", cpu_bytes, 0)
    figures = Figures(found, DataFigures(recipe.train.max_steps or 1), machine, 1, 1, "bf16")
    return best_plan(recipe, figures, profile_of(Rates(), recipe.train.seq_len))


def profile_of(rates: Rates, rows: int) -> Profile:
    """An H100 whose block (bench/block.py) is as fast as the lanes play it, with `rows` tokens."""
    lanes, memory = Lanes(rates), Memory(8 * GIB)
    with virtual(lanes, memory):
        block = Block(4096, rows, device=DEVICE, dtype=torch.bfloat16)
        batch = torch.empty(1, rows, 4096, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2):  # the first one finds no gradient to add to
            lanes.synchronize(DEVICE)
            start = lanes.now
            pass_over([block], [batch])
        lanes.synchronize(DEVICE)
    speed = 4 * block.flops(rows) / (lanes.now - start)
    return replace(BUILT_IN["dgx-h100"], accelerators=1, passes={"bf16": {rows: speed}})


def play(recipe: Recipe, plan: Plan, rates: Rates, steps: int = WARM_UP + 1) -> Played:
    """The last of `steps` steps of the plan."""
    lanes, memory = Lanes(rates), Memory(8 * GIB)
    with virtual(lanes, memory):
        engine, model, _ = open_engine(recipe, plan, DEVICE, Ranks(), Trace(), lambda line: None)
        try:
            for _ in range(steps):
                start, *before = _noted(lanes)
                _step(engine, model, recipe, plan)
            end, *after = _noted(lanes)
        finally:
            engine.close()
    return Played(end - start, *(_since(now, then) for now, then in zip(after, before, strict=True)))


def _noted(lanes: Lanes) -> tuple[Any, ...]:
    lanes.play(lanes.now)
    return lanes.now, *(counter.copy() for counter in (lanes.launches, lanes.busy, lanes.kernel_seconds, lanes.waited))


def _since(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value - then.get(name, 0) for name, value in now.items()}


def _step(engine: Engine, model: torch.nn.Module, recipe: Recipe, plan: Plan) -> None:
    """A step as train/loop.py makes it."""
    train = recipe.train
    work = []
    for number in range(plan.micro_batches):
        ids = torch.zeros(1, train.seq_len, dtype=torch.long)
        given = (ids.to(DEVICE), ids.to(DEVICE))
        work.append(MicroBatch(partial(model_loss, model, *given), 1 / plan.micro_batches, number))
    engine.train_step(work, AdamW(1e-5, fused=True), max_grad_norm=train.max_grad_norm, eager=plan.update == "eager")


@contextmanager
def virtual(lanes: Lanes, memory: Memory) -> Iterator[None]:
    """A context in which the CPU is an accelerator with these lanes, in every thread that starts in it."""
    make, run = Arena.__init__, threading.Thread.run

    def made(arena: Arena, capacity: int, device: torch.device, **more: Any) -> None:
        make(arena, capacity, device, **more)
        memory.add(arena._region, device=device == DEVICE)

    def priced(thread: threading.Thread) -> None:
        with Priced(lanes, memory):
            run(thread)

    with (
        patch.dict(streams.implementations, {"cpu": lanes}),
        patch.object(Arena, "__init__", made),
        patch.object(threading.Thread, "run", priced),
        products_added_up(),
        norms_in_one_kernel(),
        Priced(lanes, memory),
    ):
        yield


if __name__ == "__main__":
    main()
