"""`zinf estimate` without a recipe: the fastest placement that fits, and how long a step of it takes.

Every placement is judged by its bytes (needs.py). Those that fit are played on the profile with a few blocks of the
model; the fastest of them is played with all blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from zinf_cli.amounts import format_bytes
from zinf_cli.model_state import PRECISIONS
from zinf_cli.plan.classic import classic_steps
from zinf_cli.plan.needs import PART_BYTES, STRATEGIES, Needs, Scenario, capacity, class_bytes, needs_of
from zinf_cli.plan.placement import TIERS
from zinf_cli.plan.schedule import Step, UnitLoad, sweep_steps
from zinf_cli.plan.simulate import RESOURCES, Cluster, Simulation, play, rates_of
from zinf_cli.plan.sizes import SHAPES, Transformer, efficiency, shape_of

SAMPLE = 6
"""How many blocks placements are compared with."""
BAND = 0.2
"""How far a step's time may be off, as a share of it. Tests hold figure 5a's runs and measured profiles to it."""
MOST_HOSTS = 4096


@dataclass(frozen=True)
class Estimate:
    """What `zinf estimate` answers: of the fastest placement that fits, or where none does, of the most frugal one."""

    scenario: Scenario
    placement: Mapping[str, str]
    per_sweep: int
    needs: Needs
    simulation: Simulation
    faster: float | None
    """Seconds of a step if the bottleneck were twice as fast; None where compute is the bottleneck."""

    @property
    def fits(self) -> bool:
        return not self.needs.missing

    @property
    def tflops(self) -> float:
        """TFLOP/s per rank. The recomputed forward counts too, as in ZeRO-Infinity."""
        return self.scenario.model.step_flops(self.scenario.sequences) / self.simulation.step_s / 1e12

    @property
    def block_bytes(self) -> float:
        """Bytes of a block's parameters and gradient, as a rank holds them if it computes the block whole."""
        return self.scenario.model.block_params * PART_BYTES

    @property
    def efficiency(self) -> dict[str, float]:
        """ZeRO-Infinity, section 4: the share of peak FLOP/s by class, with the bandwidth of the class's tier."""
        scenario, model = self.scenario, self.scenario.model
        rates = rates_of(scenario.profile, _cluster(scenario))
        alone = {"device": scenario.profile.device_bandwidth, "cpu": rates["copy in"]}
        alone["nvme"] = min(alone["cpu"], rates["nvme read"])
        world, peak = scenario.world_size, scenario.profile.peak(scenario.precision)
        network = rates["network"] if world > 1 else float("inf")
        sequences = scenario.micro_batch_size
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
        scenario, sizes = self.scenario, class_bytes(self.scenario, self.per_sweep)
        reasons = {}
        for state, tier in self.placement.items():
            if state in scenario.pinned:
                reasons[state] = "as asked"
                continue
            faster = TIERS[TIERS.index(scenario.compute_tier) : TIERS.index(tier)]
            allowed = [name for name in faster if name in STRATEGIES[scenario.strategy].tiers[state]]
            why = "; " + ", ".join(self._room(name, sizes[state]) for name in allowed)
            if not allowed:
                why = f", as {scenario.strategy} has it" if faster else ", the fastest tier"
            reasons[state] = format_bytes(sizes[state]) + why
        return reasons

    def _room(self, tier: str, num_bytes: float) -> str:
        may_use = self.needs.may_use[tier]
        if num_bytes > may_use:
            return f"{tier} may hold {format_bytes(may_use)}"
        return f"{tier} has {format_bytes(max(0.0, may_use - self.needs.total(tier)))} left"

    def to_json(self) -> dict[str, Any]:
        """What `zinf estimate --json` prints: bytes, seconds, FLOP/s."""
        scenario, model, needs = self.scenario, self.scenario.model, self.needs
        have = capacity(scenario.profile, scenario.ranks)
        return {
            "params": model.params,
            "model": {"layers": model.layers, "hidden": model.hidden, "heads": model.heads, "vocab": model.vocab},
            "seq_len": model.seq_len,
            "micro_batch_size": scenario.micro_batch_size,
            "micro_batches": scenario.micro_batches,
            "micro_batches_per_sweep": self.per_sweep,
            "hardware": scenario.profile.name,
            "nodes": scenario.hosts,
            "gpus_per_node": scenario.ranks,
            "strategy": scenario.strategy,
            "model_states_bytes": scenario.state_bytes,
            "activation_bytes": {
                "full": round(model.activation_bytes(scenario.micro_batch_size)),
                "checkpoints": round(model.checkpoint_bytes(scenario.micro_batch_size)),
                "working": round(model.activation_working_bytes(scenario.micro_batch_size)),
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
            "whole_block_fits": not needs.tiles,
            "step_s": self.simulation.step_s,
            "step_s_band": [self.simulation.step_s * (1 - BAND), self.simulation.step_s * (1 + BAND)],
            "tflops_per_gpu": self.tflops,
            "bottleneck": self.simulation.bottleneck,
            "step_s_with_bottleneck_doubled": self.faster,
            "waiting": self.simulation.waiting,
            "lanes": dict(self.simulation.busy),
        }


def estimate(scenario: Scenario) -> Estimate:
    """The fastest placement that fits, or the most frugal one where none does."""
    best = _best(scenario)
    if best is None:
        frugal = {state: tiers[-1] for state, tiers in _allowed(scenario).items()}
        best = frugal, scenario.per_sweep or 1
    placement, per_sweep = best
    needs = needs_of(scenario, placement, per_sweep)
    rates = rates_of(scenario.profile, _cluster(scenario))
    ops, ends = sweep_steps(step_of(scenario, placement, per_sweep, needs))
    simulation = play(ops, ends, rates)
    faster = None
    if simulation.bottleneck != "compute":
        lanes = {*RESOURCES[simulation.bottleneck], *({"both"} if simulation.bottleneck == "nvme" else ())}
        doubled = {name: rate * (2 if name in lanes else 1) for name, rate in rates.items()}
        faster = play(ops, ends, doubled).step_s
    return Estimate(scenario, placement, per_sweep, needs, simulation, faster)


def largest_model(scenario: Scenario) -> Transformer | None:
    """The largest model of a known kind of shape that fits; None where not even the smallest does."""
    smallest = Transformer(*SHAPES[0])
    low, high = float(smallest.params), 1e16

    def fits(params: float) -> bool:
        model = shape_of(params, scenario.model.vocab, scenario.model.seq_len)
        return _best(replace(scenario, model=model), compare=False) is not None

    if not fits(low):
        return None
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if fits(middle) else (low, middle)
    return shape_of(low, scenario.model.vocab, scenario.model.seq_len)


def hosts_needed(scenario: Scenario) -> int | None:
    """The fewest hosts on which the scenario fits; None where MOST_HOSTS are too few."""

    def fits(hosts: int) -> bool:
        return _best(replace(scenario, hosts=hosts), compare=False) is not None

    if not fits(MOST_HOSTS):
        return None
    low, high = scenario.hosts, MOST_HOSTS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def paper_simulation(scenario: Scenario, placement: Mapping[str, str], model_parallel: int = 1) -> Simulation:
    """The scenario under ZeRO-Infinity's own schedule (classic_steps), with Megatron's model parallelism."""
    model, whole = scenario.model, scenario.micro_batch_size * scenario.model.seq_len
    unit = model.block_params / model_parallel
    # four all-reduces of a block's output in forward and recompute, of which the forward pass has two
    exchange = 2 * 2 * (model_parallel - 1) / model_parallel * whole * model_parallel * model.hidden * 2
    step = replace(
        step_of(scenario, placement, 1, needs_of(scenario, placement, 1)),
        units=[
            UnitLoad(f"block {number}", unit, unit, 2 * model.block_params * whole, 2 * whole * model.hidden)
            for number in range(model.layers)
        ],
        world_size=scenario.world_size // model_parallel,
        exchange_bytes=exchange if model_parallel > 1 else 0,
    )
    return play(*classic_steps(step), rates_of(scenario.profile, _cluster(scenario)))


def step_of(
    scenario: Scenario, placement: Mapping[str, str], per_sweep: int, needs: Needs, blocks: int | None = None
) -> Step:
    """The step as a schedule plays it: of the first `blocks` blocks, or of all."""
    model, tokens = scenario.model, scenario.micro_batch_size * scenario.model.seq_len
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
        scenario.micro_batches,
        per_sweep,
        scenario.world_size,
        placement,
        accelerator=bool(scenario.profile.accelerators),
        dtype=PRECISIONS[scenario.precision],
        depth=2 if needs.tiles > 1 else 4,
        chunk_params=needs.chunk_params,
    )


def _cluster(scenario: Scenario) -> Cluster:
    rows = scenario.micro_batch_size * scenario.model.seq_len
    return Cluster(scenario.hosts, scenario.ranks, scenario.precision, rows)


def _allowed(scenario: Scenario) -> dict[str, tuple[str, ...]]:
    """The tiers that each class may lie on, the fastest first."""
    first = TIERS.index(scenario.compute_tier)
    return {
        state: (scenario.pinned[state],) if state in scenario.pinned else tuple(t for t in tiers if t in TIERS[first:])
        for state, tiers in STRATEGIES[scenario.strategy].tiers.items()
    }


def _candidates(scenario: Scenario) -> Iterator[tuple[dict[str, str], int]]:
    """Placements with as many micro-batches in a sweep as there are, then with fewer."""
    per_sweep = scenario.per_sweep or scenario.micro_batches
    while True:
        for tiers in itertools.product(*_allowed(scenario).values()):
            yield dict(zip(_allowed(scenario), tiers, strict=True)), per_sweep
        if per_sweep == 1 or scenario.per_sweep is not None:
            return
        per_sweep = -(-per_sweep // 2)


def _best(scenario: Scenario, *, compare: bool = True) -> tuple[dict[str, str], int] | None:
    """The placement, and the micro-batches of its sweep; None where nothing fits.

    Of the longest sweep that fits, the fastest placement is taken. Without `compare`, it is the first that fits.
    """
    fitting: list[tuple[float, float, dict[str, str], int]] = []
    rates = rates_of(scenario.profile, _cluster(scenario))
    for placement, per_sweep in _candidates(scenario):
        if fitting and per_sweep != fitting[0][3]:
            break
        needs = needs_of(scenario, placement, per_sweep)
        if needs.missing:
            continue
        seconds = 0.0
        if compare:
            seconds = play(*sweep_steps(step_of(scenario, placement, per_sweep, needs, SAMPLE)), rates).step_s
        slow = sum(TIERS.index(tier) * scenario.bytes_per_param.get(state, 1) for state, tier in placement.items())
        fitting.append((round(seconds, 6), slow, placement, per_sweep))
        if not compare:
            break
    return min(fitting, key=lambda entry: entry[:2])[2:] if fitting else None
