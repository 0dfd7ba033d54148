"""What `zinf estimate` shows: need against have per tier, where everything lies and why, how long a step takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from zinf_cli.amounts import format_bytes, format_count, format_number, format_seconds
from zinf_cli.plan.estimate import BAND, Estimate
from zinf_cli.plan.failures import expected_failures
from zinf_cli.plan.memory import NAMES
from zinf_cli.plan.needs import capacity
from zinf_cli.plan.placement import TIERS
from zinf_cli.plan.simulate import Simulation
from zinf_cli.screen import outside

if TYPE_CHECKING:
    from zinf_cli.plan.alternatives import Alternative
    from zinf_cli.plan.plan import Plan

BAR = 24
"""Characters of a full bar."""


def estimate_screen(answer: Estimate, *, explain: bool = False) -> RenderableType:
    """The whole screen; with `explain`, the terms of each sum and the formulas they come from."""
    scenario, model = answer.scenario, answer.scenario.model
    head = Table.grid(padding=(0, 2))
    head.add_column(style="dim")
    head.add_column()
    head.add_row(
        "model",
        f"{format_count(model.params)} parameters: {model.layers} layers, hidden {model.hidden}, {model.heads} heads"
        + (f", vocabulary {model.vocab}" if model.vocab else ""),
    )
    kind = "GPUs" if scenario.profile.accelerators else "CPU ranks"
    hosts = f"{scenario.hosts} × {scenario.profile.name}"
    head.add_row("machine", f"{hosts}, {scenario.world_size} {kind}" + _strategy(answer))
    each = f"{scenario.micro_batch_size:g} {'sequence' if scenario.micro_batch_size == 1 else 'sequences'}"
    head.add_row(
        "step",
        f"on each of them {scenario.micro_batches} × {each} of {model.seq_len} tokens"
        + (f", {answer.per_sweep} in a sweep" if scenario.micro_batches > 1 else ""),
    )
    parts: list[RenderableType] = [head, Text(), _tiers(answer), Text(), _placement(answer), Text(), _verdict(answer)]
    if explain:
        parts += [Text(), _terms(answer), Text(), _formulas(answer)]
    title = f"zinf estimate · {format_count(model.params)} on {hosts}"
    return Panel(Group(*parts), title=outside(title), expand=False)


def _strategy(answer: Estimate) -> str:
    return "" if answer.scenario.strategy == "infinity" else f", {answer.scenario.strategy}"


def _tiers(answer: Estimate) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("on each host")
    for title in ("needs", "may use", "has"):
        table.add_column(title, justify="right")
    table.add_column("")
    table.add_column("")
    have = capacity(answer.scenario.profile, answer.scenario.ranks)
    for tier in TIERS:
        if have[tier]:
            need, allowed = answer.needs.total(tier), answer.needs.may_use[tier]
            fits = tier not in answer.needs.missing
            shared = " with device" if tier == "cpu" and answer.scenario.profile.one_pool else ""
            table.add_row(
                f"{tier}{shared}",
                format_bytes(need),
                format_bytes(allowed),
                format_bytes(have[tier]),
                bar(need / have[tier], allowed / have[tier], fits=fits),
                Text("fits", style="green")
                if fits
                else Text(f"{format_bytes(need - allowed)} too much", style="bold red"),
            )
    return table


def bar(share: float, usable: float, *, fits: bool) -> Text:
    """How full a tier is; the part a plan leaves free is dotted."""
    full = min(BAR, max(1 if share > 0.002 else 0, round(share * BAR)))
    free = max(0, round(usable * BAR) - full)
    return (
        Text("█" * full, style="green" if fits else "red")
        + Text("░" * free, style="dim")
        + Text("·" * (BAR - full - free), style="dim")
    )


def _placement(answer: Estimate) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("placement", "tier", ""):
        table.add_column(title, style="dim" if not title else "")
    reasons = answer.reasons()
    for state, tier in answer.placement.items():
        shown = answer.scenario.compute_tier if tier == "device" else tier
        table.add_row(NAMES[state], shown, reasons[state])
    return table


def _verdict(answer: Estimate) -> Table:
    played = answer.simulation
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    if not answer.fits:
        table.add_row("fits", Text("no", style="bold red"))
        return table
    table.add_row("fits", Text("yes", style="bold green"))
    table.add_row(
        "step",
        f"{format_seconds(played.step_s)}, give or take {100 * BAND:.0f} %; "
        f"{answer.tflops:.3g} TFLOP/s per rank with recompute, waiting {100 * played.waiting:.0f} %",
    )
    table.add_row("bound by", f"{played.bottleneck}; {_what_would_move_it(answer)}")
    busy = ", ".join(f"{lane} {100 * share:.0f} %" for lane, share in played.busy.items() if share >= 0.005)
    table.add_row("busy", busy)
    if (failures := expected_failures(answer)) is not None:
        table.add_row("failures", failures)
    if answer.needs.tiles:
        table.add_row(
            "parts",
            f"a block would take {format_bytes(answer.block_bytes)} of each rank, and as much for the next one; "
            f"it is computed in parts, its largest matrix {_tiles(answer.needs.tiles)}",
        )
    return table


def _tiles(count: int) -> str:
    return "whole" if count == 1 else f"in {count} tiles"


def _what_would_move_it(answer: Estimate) -> str:
    if answer.faster is None:
        return "only faster compute or fewer tokens would shorten it"
    text = f"twice its speed would make a step {format_seconds(answer.faster)}"
    if answer.simulation.bottleneck != "network" and answer.simulation.waiting > 0.1:
        text += "; more micro-batches a step cost no more traffic"
    return text


def _terms(answer: Estimate) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("of which")
    table.add_column("")
    table.add_column("", justify="right")
    for tier in TIERS:
        for number, (name, num_bytes) in enumerate(answer.needs.terms[tier].items()):
            table.add_row(tier if not number else "", NAMES[name], format_bytes(num_bytes))
    return table


def _formulas(answer: Estimate) -> Table:
    model, sequences, each = answer.scenario.model, answer.scenario.micro_batch_size, answer.scenario.bytes_per_param
    table = Table(box=None, pad_edge=False)
    for title in ("ZeRO-Infinity, section 3 and 4", "", ""):
        table.add_column(title, justify="right" if table.columns[1:] else "left")
    rows: Sequence[tuple[str, str, str]] = (
        (
            "parameters",
            "12 · layers · hidden²" + (" + vocab · hidden" if model.vocab else ""),
            format_count(model.params),
        ),
        (
            "model states",
            f"{sum(each.values()):g} B · parameters ({', '.join(f'{each[state]:g} {NAMES[state]}' for state in each)})",
            format_bytes(answer.scenario.state_bytes),
        ),
        (
            "checkpoints of a micro-batch",
            "2 · batch · seq · hidden · layers",
            format_bytes(model.checkpoint_bytes(sequences)),
        ),
        (
            "all its activations",
            "batch · seq · (16 · hidden + 2 · heads · seq) · layers",
            format_bytes(model.activation_bytes(sequences)),
        ),
        (
            "working memory, activations",
            "the same of one layer",
            format_bytes(model.activation_working_bytes(sequences)),
        ),
        (
            "working memory, states",
            "16 · hidden²",
            format_bytes(model.state_working_bytes),
        ),
        (
            "compute of a rank",
            "8 · batch · seq · parameters",
            f"{model.step_flops(answer.scenario.sequences):.3g} FLOP",
        ),
        *(
            (f"efficiency, {NAMES[state]}", form, f"{100 * answer.efficiency[state]:.1f} %")
            for state, form in (
                ("params", "intensity batch · seq, if nothing overlapped"),
                ("optimizer", "intensity batch · seq / 4"),
                ("activations", "intensity 24 · hidden"),
            )
        ),
    )
    for row in rows:
        table.add_row(*row)
    return table


def time_screen(plan: Plan, played: Simulation, reasons: Mapping[str, str], *, known: bool) -> RenderableType:
    """What a recipe's plan will take: how full each tier is, placement with its reasons, the step's time and lanes."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for limit in plan.limits:
        fits = limit.needed <= limit.allowed
        verdict = "fits" if fits else f"{format_bytes(limit.needed - limit.allowed)} too much"
        filled = bar(limit.needed / max(1, limit.allowed), 1.0, fits=fits)
        table.add_row(f"{limit.tier} filled", filled + Text(f" {verdict}", style="green" if fits else "bold red"))
    table.add_row("", "")
    for state, reason in reasons.items():
        table.add_row(NAMES[state], reason)
    table.add_row("", "")
    band = f"give or take {100 * BAND:.0f} %" if known else "by assumed rates; zinf bench measures them"
    table.add_row("step", f"{format_seconds(played.step_s)}, {band}")
    if plan.checkpoint is not None:
        table.add_row("with checkpoint", format_seconds(plan.checkpoint.step_s))
    table.add_row("bound by", f"{played.bottleneck}; compute waits {100 * played.waiting:.0f} % of it")
    for lane, share in played.busy.items():
        if share >= 0.005:
            table.add_row(lane, bar(share, 1.0, fits=True) + Text(f" {100 * share:.0f} %"))
    return Panel(table, title="placement and time", expand=False)


def alternatives_screen(plan: Plan, others: Sequence[Alternative], each: int) -> RenderableType:
    """What each choice would buy, beside the plan: speed, seconds, bytes to and from drives, CPU memory."""
    from zinf_cli.plan.alternatives import Alternative

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for title in ("speed", "a step", "NVMe a step", "CPU memory"):
        table.add_column(title, justify="right")
    planned = Alternative("as planned", plan)
    speed = planned.tokens_per_s(each)
    for row in (planned, *others):
        figures = (
            f"{row.tokens_per_s(each) / speed:.2f}",
            format_seconds(row.plan.step_s),
            format_bytes(row.plan.nvme_traffic_clipped),
            format_bytes(row.cpu_bytes),
        )
        cells = figures if row.plan.fits else (Text("does not fit", style="bold red"), "", "", figures[-1])
        table.add_row(outside(row.change + (" *" if row.other_results else "")), *cells)
    clipped = " Steps are clipped ones, which take longest." if plan.update == "speculative" else ""
    note = (
        f"A speed of 1 is {format_number(speed)} tokens a second.{clipped} NVMe is of a rank, CPU memory of a host. "
        "* Trains to other results."
    )
    return Panel(Group(table, Text(), Text(note, style="dim")), title="what each choice would buy", expand=False)
