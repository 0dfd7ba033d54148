"""`zinf estimate` without a recipe: the fastest placement that fits, and how long a step of it takes.

Every placement is judged by its bytes (needs.py); those that fit are played on the profile with a few blocks of the
model, and the fastest of them with all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from zinf_cli.amounts import format_bytes
from zinf_cli.model_state import GRAD
from zinf_cli.plan.classic import classic_steps
from zinf_cli.plan.needs import STRATEGIES, Needs, Question, capacity, class_bytes, needs_of
from zinf_cli.plan.placement import TIERS
from zinf_cli.plan.schedule import Step, UnitLoad, sweep_steps
from zinf_cli.plan.simulate import RESOURCES, Cluster, Simulation, play, rates_of
from zinf_cli.plan.sizes import BYTES_PER_PARAM, SHAPES, Transformer, efficiency, shape_of

SAMPLE = 6
"""Blocks that placements are compared with."""
BAND = 0.2
"""How far a step's time may be off: what figure 5a's runs, or a measured profile, are tested to."""
MOST_HOSTS = 4096


@dataclass(frozen=True)
class Estimate:
    """One answer. Where nothing fits, the most frugal placement and what it lacks."""

    question: Question
    placement: Mapping[str, str]
    per_sweep: int
    needs: Needs
    simulation: Simulation
    faster: float | None
    """The step's seconds with the bottleneck's speed doubled; None where compute is the bottleneck."""

    @property
    def fits(self) -> bool:
        return not self.needs.missing

    @property
    def tflops(self) -> float:
        """Per rank, the recomputed forward included, as ZeRO-Infinity counts."""
        return self.question.model.step_flops(self.question.sequences) / self.simulation.step_s / 1e12

    @property
    def block_bytes(self) -> float:
        """A block's parameters and gradient, which a rank holds while it computes it whole, as the engine does."""
        return self.question.model.block_params * (BYTES_PER_PARAM["params"] + GRAD.item_bytes)

    @property
    def block_fits(self) -> bool:
        """Whether the engine's whole blocks fit where the paper's largest matrix does."""
        question = self.question
        held = self.needs.total(question.compute_tier) - self.needs.terms[question.compute_tier]["matrix"]
        return held + question.ranks * self.block_bytes <= self.needs.may_use[question.compute_tier]

    @property
    def efficiency(self) -> dict[str, float]:
        """Section 4, with the bandwidth each class has on its tier."""
        question, model = self.question, self.question.model
        rates = rates_of(question.profile, _host(question))
        alone = {"device": question.profile.device_bandwidth, "cpu": rates["copy in"]}
        alone["nvme"] = min(alone["cpu"], rates["nvme read"])
        world, peak = question.world_size, question.profile.peak(_precision(question))
        network = rates["network"] if world > 1 else float("inf")
        sequences = question.micro_batch_size
        return {
            "params": efficiency(
                model.params_intensity(sequences), min(network, world * alone[self.placement["params"]]), peak
            ),
            "optimizer": efficiency(
                model.optimizer_intensity(sequences), world * alone[self.placement["optimizer"]], peak
            ),
            "activations": efficiency(model.activations_intensity, alone[self.placement["activations"]], peak),
        }

    def reasons(self) -> dict[str, str]:
        """Why each class lies where it does, in a line."""
        question, sizes = self.question, class_bytes(self.question, self.per_sweep)
        reasons = {}
        for state, tier in self.placement.items():
            if state in question.pinned:
                reasons[state] = "as asked"
                continue
            faster = TIERS[TIERS.index(question.compute_tier) : TIERS.index(tier)]
            allowed = [name for name in faster if name in STRATEGIES[question.strategy].tiers[state]]
            room = [self._room(name, sizes[state]) for name in allowed]
            reasons[state] = f"{format_bytes(sizes[state])}" + (
                f"; {', '.join(room)}" if room else ", the fastest tier"
            )
        return reasons

    def _room(self, tier: str, num_bytes: float) -> str:
        may_use = self.needs.may_use[tier]
        if num_bytes > may_use:
            return f"{tier} may hold {format_bytes(may_use)}"
        return f"{tier} has {format_bytes(max(0.0, may_use - self.needs.total(tier)))} left"

    def to_json(self) -> dict[str, Any]:
        question, model, needs = self.question, self.question.model, self.needs
        have = capacity(question.profile, question.ranks)
        return {
            "params": model.params,
            "model": {"layers": model.layers, "hidden": model.hidden, "heads": model.heads, "vocab": model.vocab},
            "seq_len": model.seq_len,
            "micro_batch_size": question.micro_batch_size,
            "micro_batches": question.micro_batches,
            "micro_batches_per_sweep": self.per_sweep,
            "hardware": question.profile.name,
            "nodes": question.hosts,
            "gpus_per_node": question.ranks,
            "strategy": question.strategy,
            "model_states_bytes": model.state_bytes,
            "activation_bytes": {
                "full": round(model.activation_bytes(question.micro_batch_size)),
                "checkpoints": round(model.checkpoint_bytes(question.micro_batch_size)),
                "working": round(model.activation_working_bytes(question.micro_batch_size)),
            },
            "state_working_bytes": model.state_working_bytes,
            "efficiency": self.efficiency,
            "tiers": {
                tier: {
                    "need_bytes": round(needs.total(tier)),
                    "have_bytes": round(have[tier]),
                    "may_use_bytes": round(needs.may_use[tier]),
                    "terms": {name: round(value) for name, value in needs.terms[tier].items()},
                }
                for tier in TIERS
                if have[tier]
            },
            "placement": dict(self.placement),
            "reasons": self.reasons(),
            "tiles": needs.tiles,
            "fits": self.fits,
            "whole_block_fits": self.block_fits,
            "step_s": self.simulation.step_s,
            "step_s_band": [self.simulation.step_s * (1 - BAND), self.simulation.step_s * (1 + BAND)],
            "tflops_per_gpu": self.tflops,
            "bottleneck": self.simulation.bottleneck,
            "step_s_with_bottleneck_doubled": self.faster,
            "waiting": self.simulation.waiting,
            "lanes": dict(self.simulation.busy),
        }


def estimate(question: Question) -> Estimate:
    """The fastest placement that fits, or the most frugal one where none does."""
    best = _best(question)
    if best is None:
        frugal = {state: tiers[-1] for state, tiers in _allowed(question).items()}
        best = frugal, question.per_sweep or 1
    placement, per_sweep = best
    needs = needs_of(question, placement, per_sweep)
    rates = rates_of(question.profile, _host(question))
    ops, ends = sweep_steps(step_of(question, placement, per_sweep, needs))
    simulation = play(ops, ends, rates)
    faster = None
    if simulation.bottleneck != "compute":
        lanes = {*RESOURCES[simulation.bottleneck], *({"both"} if simulation.bottleneck == "nvme" else ())}
        doubled = {name: rate * (2 if name in lanes else 1) for name, rate in rates.items()}
        faster = play(ops, ends, doubled).step_s
    return Estimate(question, placement, per_sweep, needs, simulation, faster)


def largest_model(question: Question) -> Transformer | None:
    """The largest model of a known kind of shape that fits; None where not even the smallest does."""
    smallest = Transformer(*SHAPES[0])
    low, high = float(smallest.params), 1e16

    def fits(params: float) -> bool:
        model = shape_of(params, question.model.vocab, question.model.seq_len)
        return _best(replace(question, model=model), compare=False) is not None

    if not fits(low):
        return None
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if fits(middle) else (low, middle)
    return shape_of(low, question.model.vocab, question.model.seq_len)


def hosts_needed(question: Question) -> int | None:
    """The fewest hosts on which it fits; None where more hosts do not help."""

    def fits(hosts: int) -> bool:
        return _best(replace(question, hosts=hosts), compare=False) is not None

    if not fits(MOST_HOSTS):
        return None
    low, high = question.hosts, MOST_HOSTS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def paper_simulation(question: Question, placement: Mapping[str, str], model_parallel: int = 1) -> Simulation:
    """The same question under ZeRO-Infinity's own schedule (classic_steps), with Megatron's model parallelism."""
    model, whole = question.model, question.micro_batch_size * question.model.seq_len
    unit = model.block_params / model_parallel
    # four all-reduces of a block's output in forward and recompute, of which the forward pass has two
    exchange = 2 * 2 * (model_parallel - 1) / model_parallel * whole * model_parallel * model.hidden * 2
    step = replace(
        step_of(question, placement, 1, needs_of(question, placement, 1)),
        units=[
            UnitLoad(f"block {number}", unit, unit, 2 * model.block_params * whole, 2 * whole * model.hidden)
            for number in range(model.layers)
        ],
        world_size=question.world_size // model_parallel,
        exchange_bytes=exchange if model_parallel > 1 else 0,
    )
    return play(*classic_steps(step), rates_of(question.profile, _host(question)))


def step_of(
    question: Question, placement: Mapping[str, str], per_sweep: int, needs: Needs, blocks: int | None = None
) -> Step:
    """The step to be played, of all blocks or of a few."""
    model, tokens = question.model, question.micro_batch_size * question.model.seq_len
    block = model.block_params
    units = [
        UnitLoad(f"block {number}", block, block, 2 * block * tokens, 2 * tokens * model.hidden)
        for number in range(blocks or model.layers)
    ]
    if model.vocab:
        table = model.vocab * model.hidden
        units.append(UnitLoad("embedding and head", table, table, 2 * table * tokens, 2 * tokens * model.hidden))
    return Step(
        units,
        question.micro_batches,
        per_sweep,
        question.world_size,
        placement,
        accelerator=bool(question.profile.accelerators),
        depth=2 if needs.tiles > 1 else 4,
        chunk_params=needs.chunk_params,
    )


def _precision(question: Question) -> str:
    return "fp16" if "fp16" in question.profile.matmul else "bf16"


def _host(question: Question) -> Cluster:
    rows = question.micro_batch_size * question.model.seq_len
    return Cluster(question.hosts, question.ranks, _precision(question), rows)


def _allowed(question: Question) -> dict[str, tuple[str, ...]]:
    """By class, the tiers it may lie on, fastest first."""
    first = TIERS.index(question.compute_tier)
    return {
        state: (question.pinned[state],) if state in question.pinned else tuple(t for t in tiers if t in TIERS[first:])
        for state, tiers in STRATEGIES[question.strategy].tiers.items()
    }


def _candidates(question: Question) -> Iterator[tuple[dict[str, str], int]]:
    """Placements with as many micro-batches in a sweep as there are, then with fewer."""
    per_sweep = question.per_sweep or question.micro_batches
    while True:
        for tiers in itertools.product(*_allowed(question).values()):
            yield dict(zip(_allowed(question), tiers, strict=True)), per_sweep
        if per_sweep == 1 or question.per_sweep is not None:
            return
        per_sweep = -(-per_sweep // 2)


def _best(question: Question, *, compare: bool = True) -> tuple[dict[str, str], int] | None:
    """The placement that is fastest among those with the longest sweep that fits."""
    fitting: list[tuple[float, int, dict[str, str], int]] = []
    rates = rates_of(question.profile, _host(question))
    for placement, per_sweep in _candidates(question):
        if fitting and per_sweep != fitting[0][3]:
            break
        needs = needs_of(question, placement, per_sweep)
        if needs.missing:
            continue
        seconds = 0.0
        if compare:
            seconds = play(*sweep_steps(step_of(question, placement, per_sweep, needs, SAMPLE)), rates).step_s
        slow = sum(TIERS.index(tier) * BYTES_PER_PARAM.get(state, 1) for state, tier in placement.items())
        fitting.append((round(seconds, 6), slow, placement, per_sweep))
        if not compare:
            break
    return min(fitting, key=lambda entry: entry[:2])[2:] if fitting else None
