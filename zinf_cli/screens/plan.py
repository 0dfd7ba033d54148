"""The plan: where the bytes will lie, what that leaves, and what a step is expected to take."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from zinf_cli.amounts import format_bytes, format_count, format_seconds
from zinf_cli.model_state import ITEM_BYTES, STATES
from zinf_cli.plan.failures import failures_line
from zinf_cli.plan.layout import Figures
from zinf_cli.plan.memory import CLASSES, NAMES
from zinf_cli.plan.plan import CheckpointStep, Plan, SweepCost
from zinf_cli.plan.wear import wear_line
from zinf_cli.recipe.hosts import this_machine
from zinf_cli.screen import outside

_TIERS = {"device": "accelerator", "cpu": "CPU memory", "nvme": "NVMe"}
_PLACES = {"device": "on the accelerator", "cpu": "in CPU memory", "nvme": "on NVMe"}


def plan_screen(plan: Plan, name: str, defaults: Sequence[str] = (), *, rest: str | None = None) -> RenderableType:
    """The plan. Its first three lines say whether it fits, where it lies and how long it takes; the rest says why.

    The tables at the end: where the bytes lie per rank, and what that leaves on this machine; then the `defaults` that
    were filled in. Where `rest` is given, it says where these are, instead of them.
    """
    model = plan.figures.model
    streamed = [unit for unit in model.units if not unit.resident]
    head = Table.grid(padding=(0, 2))
    head.add_column(style="dim")
    head.add_column()
    for word, answer in _answers(plan).items():
        head.add_row(word, Text(answer, "bold"))
    head.add_row()
    head.add_row("model", f"{model.architecture}, {_parameters(plan.figures)}, {len(streamed)} units")
    head.add_row("hosts" if len(plan.hosts) > 1 else "host", f"{_places(plan)}, {plan.precision}{_moments(plan)}")
    sweeps = -(-plan.micro_batches // plan.per_sweep)
    head.add_row(
        "step",
        f"{_batch(plan)}, in {_count(sweeps, 'sweep', 'sweeps')}; {_steps(plan)}",
    )
    if plan.sweep_cost is not None:
        head.add_row("sweeps", _cost_of_sweeps(plan.sweep_cost, plan.micro_batches))
    if model.most is not None:
        head.add_row("parts", f"blocks are computed in parts of up to {format_count(model.most)} parameters")
    if model.tokens_in_chunks:
        head.add_row("MLPs", "are computed in chunks of tokens, and once more in backward")
    head.add_row("backward", _recomputed(plan))
    if plan.cached_units:
        names = ", ".join(NAMES[state] for state in STATES if state in plan.cached_states)
        place = _PLACES[plan.choice.cache_tier]
        head.add_row("cached", f"{len(plan.cached_units)} of {len(model.units)} units: their {names} stay {place}")
    if plan.staying_units:
        saved = f"what {len(plan.staying_units)} of {len(model.units)} units need in backward stays in memory"
        head.add_row("activations", saved)
    for line in plan.figures.data.texts:
        head.add_row("text", outside(line))
    if plan.resume is not None:
        head.add_row("resume", plan.resume)
    head.add_row("expected", _expectation(plan))
    if plan.nvme_folders:
        io = plan.io
        threads = f"{io.readers} threads read and {io.writers} write blocks of {format_bytes(io.block_bytes)}"
        head.add_row("nvme", f"{', '.join(plan.nvme_folders)}; for each, {threads}")
    rated = rest is None or plan.endurance_bytes is not None
    for word, told in (("wear", wear_line(plan) if rated else None), ("failures", failures_line(plan))):
        if told is not None:
            head.add_row(word, told)
    if plan.checkpoint is not None:
        head.add_row("checkpoint", _checkpoint(plan.checkpoint))
    for line in (*model.notes, *plan.figures.data.notes):
        head.add_row("note", outside(line))
    below = _tables(plan, defaults) if rest is None else [outside(rest, "dim")]
    return Panel(Group(head, Text(), *below), title=outside(f"zinf · {name}"), expand=False)


def _tables(plan: Plan, defaults: Sequence[str]) -> list[RenderableType]:
    parts: list[RenderableType] = [_bytes_table(plan), Text(), _limits_table(plan)]
    return [*parts, Text(), outside(f"defaults: {', '.join(defaults)}", "dim")] if defaults else parts


def _answers(plan: Plan) -> dict[str, str]:
    """What a user asks first: does it fit, where will it lie, how long will it take?"""
    sizes = (
        f"{_TIERS.get(limit.tier, limit.tier)} {format_bytes(limit.needed)} of {format_bytes(limit.allowed)}"
        for limit in plan.limits
    )
    tiers = {tier: [state for state in CLASSES if plan.placement[state] == tier] for tier in plan.placement.values()}
    cached = f", but for {_count(len(plan.cached_units), 'unit', 'units')} {_PLACES[plan.choice.cache_tier]}"
    lies = [
        f"{', '.join(NAMES[state] for state in states)} {_PLACES[tier]}"
        + (cached if plan.cached_units and set(states) & set(plan.cached_states) else "")
        for tier, states in tiers.items()
    ]
    seconds, saved = plan.max_steps * plan.step_s, plan.checkpoint
    if saved is not None:
        seconds += -(-plan.max_steps // saved.interval) * (saved.step_s - plan.step_s)
    steps = f"{format_seconds(seconds)} for {_steps(plan)}, " if plan.resume is None else ""
    return {
        "fits" if plan.fits else "too large": ", ".join(sizes),
        "lies": "; ".join(lies),
        "takes": f"{steps}{format_seconds(plan.step_s)} a step, bound by {plan.bottleneck}",
    }


def _steps(plan: Plan) -> str:
    if plan.figures.data.about:
        return f"about {float(f'{plan.max_steps:.2g}'):.0f} steps"
    return _count(plan.max_steps, "step", "steps")


def _is_here(plan: Plan) -> bool:
    return plan.hosts == (this_machine(plan.world_size),)


def _batch(plan: Plan) -> str:
    """The global batch, and what it is made of."""
    sequences, ranks, micro_batches = plan.sequences_per_step, plan.world_size, plan.micro_batches
    size = -(-sequences // (ranks * micro_batches))
    product = f"{_count(ranks, 'rank', 'ranks')} × {_count(micro_batches, 'micro-batch', 'micro-batches')} of {size}"
    at_most = "" if ranks * micro_batches * size == sequences else " at most"
    return f"{_count(sequences, 'sequence', 'sequences')} = {product}{at_most}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _parameters(figures: Figures) -> str:
    model = figures.model
    trained = f", {format_count(model.num_trained)} of them trained" if model.num_trained < model.num_params else ""
    if (unpacked := sum(unit.unpacked_bytes for unit in model.units)) > 0:
        numel = unpacked // ITEM_BYTES[figures.dtype]
        bits = 8 * sum(unit.packed_bytes for unit in model.units) / numel
        trained += f", {format_count(numel)} frozen in {bits:.2f} bits"
    return f"{format_count(model.num_params)} parameters{trained}"


def _places(plan: Plan) -> str:
    if _is_here(plan):
        return f"this machine, {plan.world_size} {_ranks(plan)}"
    names = ", ".join(host.name for host in plan.hosts[:4]) + (", ..." if len(plan.hosts) > 4 else "")
    return f"{len(plan.hosts)} ({names}), {plan.world_size} {_ranks(plan)}"


def _ranks(plan: Plan) -> str:
    kind = "accelerator" if plan.figures.machine.accelerators else "CPU"
    threads = f", {_count(plan.threads_per_rank, 'thread', 'threads')} each" if kind == "CPU" else ""
    return f"{kind} {'rank' if plan.world_size == 1 else 'ranks'}{threads}"


def _moments(plan: Plan) -> str:
    """What each update does to moments that are stored in fewer bits."""
    dtype = plan.figures.optimizer.state_dtype
    return "" if dtype == "fp32" else f"; each update rounds moments to {dtype}: results differ from those of fp32"


def _recomputed(plan: Plan) -> str:
    units = [n for n in plan.figures.model.order if n != plan.figures.model.turn]
    kept = len(set(units) & set(plan.kept_units))
    if not kept:
        return "recomputes the activations of every unit but the last"
    return f"keeps the activations of {'all units' if kept == len(set(units)) else _count(kept, 'unit', 'units')}"


def _expectation(plan: Plan) -> str:
    step, calm = format_seconds(plan.step_s), format_seconds(plan.calm_step_s)
    unclipped = f" ({calm} where nothing is clipped)" if plan.update == "speculative" and calm != step else ""
    text = f"{step} a step{unclipped}: {format_seconds(plan.compute_s)} of compute"
    if plan.nvme_traffic:
        rate = plan.nvme_traffic_clipped * plan.figures.ranks_per_host / plan.nvme_s / 1e9
        known = "the measured" if plan.drives_measured else "an assumed"
        traffic = format_bytes(plan.nvme_traffic_clipped) + (" a rank" if plan.figures.ranks_per_host > 1 else "")
        text += f", {traffic} to and from NVMe ({format_seconds(plan.nvme_s)} at {known} {rate:.2g} GB/s)"
    return text


def _cost_of_sweeps(cost: SweepCost, micro_batches: int) -> str:
    short = " and ".join(
        f"{limit.tier} would need {format_bytes(limit.needed)} of {format_bytes(limit.allowed)}"
        for limit in cost.lacking
    )
    why = f"for {micro_batches} micro-batches in one, {short}" if short else "as train.micro_batches_per_sweep says"
    longer = format_seconds(cost.step_s)
    return f"{why}; more than one moves {format_bytes(cost.traffic)} more a step, and takes {longer} longer"


def _checkpoint(step: CheckpointStep) -> str:
    """How often, how large, where, and what its step moves beside."""
    every = "every step" if step.interval == 1 else f"every {step.interval} steps"
    text = f"{every} {format_bytes(step.num_bytes)} to {step.folder}; "
    if not step.traffic:
        return text + "updates write into it instead of in place, which moves no byte more"
    copied = "all of it" if step.traffic == step.num_bytes else format_bytes(step.traffic)
    return text + f"{copied} is written beside what a step moves, and such a step takes {format_seconds(step.step_s)}"


def _bytes_table(plan: Plan) -> Table:
    tiers = ["device", "cpu", "nvme"] if plan.figures.machine.accelerators else ["cpu", "nvme"]
    table = Table(box=None, pad_edge=False)
    table.add_column("bytes per rank")
    for tier in tiers:
        table.add_column(tier, justify="right")
    for line in plan.lines:
        cells = [format_bytes(line.num_bytes) if tier == line.tier else "" for tier in tiers]
        table.add_row(NAMES[line.what], *cells)
    return table


def _limits_table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(f"on {plan.figures.machine.name}" if len(plan.hosts) == 1 and _is_here(plan) else "on each host")
    table.add_column("needs", justify="right")
    table.add_column("may use", justify="right")
    table.add_column("limit set by", style="dim")
    for limit in plan.limits:
        word = " with device" if limit.tier == "cpu" and plan.figures.machine.one_pool else ""
        if limit.tier == "device" and plan.figures.ranks_per_host > 1:
            word = f", each of {plan.figures.ranks_per_host}"
        table.add_row(f"{limit.tier}{word}", format_bytes(limit.needed), format_bytes(limit.allowed), limit.origin)
    return table
