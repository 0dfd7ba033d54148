"""A plan as `zinf estimate RECIPE` tells it: as JSON, and why each class lies where it does."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from zinf_cli.amounts import format_bytes
from zinf_cli.machine.profiles import Profile
from zinf_cli.model_state import STATES
from zinf_cli.plan.buffers import block_bytes
from zinf_cli.plan.memory import state_bytes
from zinf_cli.plan.placement import TIERS
from zinf_cli.plan.plan import Limit, Plan
from zinf_cli.plan.predict import cluster_of
from zinf_cli.plan.simulate import rates_of
from zinf_cli.plan.sizes import efficiency
from zinf_cli.recipe.recipe import Recipe


def reasons_of(plan: Plan, recipe: Recipe) -> dict[str, str]:
    """A line for each class: its tier, and why it lies there."""
    sizes = {line.what: line.num_bytes for line in plan.lines}
    tiers = [limit.tier for limit in plan.limits]
    reasons = {}
    for state, tier in plan.placement.items():
        if getattr(recipe.offload, state) != "auto":
            reasons[state] = f"{tier}: as the recipe says"
            continue
        faster = [name for name in TIERS[: TIERS.index(tier)] if name in tiers]
        room = [f"{name} has {format_bytes(max(0, plan.room(name)))} left for it" for name in faster]
        why = ", ".join(room) if room else "the fastest tier"
        count = len(plan.cached_units)
        some = f" but for {count} {'unit' if count == 1 else 'units'}" if state in plan.cached_states else ""
        reasons[state] = f"{tier}{some}: {format_bytes(sizes[state])} a rank; {why}"
    return reasons


def plan_document(plan: Plan, tokens: int, profile: Profile) -> dict[str, Any]:
    """The plan as JSON, with the keys of every estimate. `tokens` are those of one micro-batch."""
    model, world = plan.figures.model, plan.world_size
    sizes = state_bytes(plan.figures, plan.choice)
    flops = model.flops_per_token * tokens * plan.micro_batches
    return {
        "params": model.num_params,
        "architecture": model.architecture,
        "hardware": profile.name,
        "nodes": len(plan.hosts),
        "gpus_per_node": plan.figures.ranks_per_host,
        "precision": plan.precision,
        "micro_batches": plan.micro_batches,
        "micro_batches_per_sweep": plan.per_sweep,
        "model_states_bytes": sum(sizes[state] for state in STATES) * world,
        "activation_bytes": {
            "full": sum(unit.saved_bytes for unit in model.units),
            "checkpoints": sum(unit.input_bytes for unit in model.units),
            "working": max((unit.saved_bytes // max(1, unit.calls) for unit in model.units), default=0),
        },
        "state_working_bytes": max(
            block_bytes(number, plan.figures, plan.choice, 1) for number in range(len(model.units))
        ),
        "efficiency": _efficiency(plan, tokens, profile),
        "tiers": {limit.tier: _on_a_host(plan, limit) for limit in plan.limits},
        "placement": plan.placement,
        "fits": plan.fits,
        "step_s": plan.step_s,
        "calm_step_s": plan.calm_step_s,
        "tflops_per_gpu": flops / plan.step_s / 1e12,
        "bottleneck": plan.bottleneck,
        "lanes": plan.busy,
        "nvme_traffic_bytes": plan.nvme_traffic,
        "checkpoint": None if plan.checkpoint is None else asdict(plan.checkpoint),
    }


def _on_a_host(plan: Plan, limit: Limit) -> dict[str, Any]:
    """Bytes of a tier on one host, on all its accelerators together."""
    ranks = plan.figures.ranks_per_host
    count = ranks // plan.figures.ranks_at(limit.tier)
    return {
        "need_bytes": limit.needed * count,
        "may_use_bytes": limit.allowed * count,
        "terms": {line.what: line.num_bytes * ranks for line in plan.lines if line.tier == limit.tier},
    }


def _efficiency(plan: Plan, tokens: int, profile: Profile) -> dict[str, float]:
    """ZeRO-Infinity, section 4: the share of peak FLOP/s by class, if nothing overlapped."""
    cluster = cluster_of(plan, tokens)
    rates, peak = rates_of(profile, cluster), profile.peak(plan.precision)
    speed = {"device": profile.device_bandwidth, "cpu": rates["copy in"]}
    speed["nvme"] = min(speed["cpu"], rates["nvme read"])
    model = plan.figures.model
    moved = 2 * sum(unit.input_bytes for unit in model.units)
    intensity = {
        "params": float(tokens),
        "optimizer": tokens / 4,
        "activations": model.flops_per_token * 4 / 3 * tokens / max(1, moved),
    }
    ranks = {"params": plan.world_size, "optimizer": plan.world_size, "activations": 1}
    return {
        state: efficiency(value, ranks[state] * speed[plan.placement[state]], peak)
        for state, value in intensity.items()
    }
