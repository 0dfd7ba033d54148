"""What a run does step by step: loss, gradient norm, learning rate, seconds, waiting, traffic, memory of each tier.

Several runs lie over each other. A run has a colour of its own then; alone, each of its curves has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes

from zinf_cli.amounts import format_bytes, format_seconds
from zinf_cli.report.ink import (
    PALETTE,
    Mark,
    Picture,
    bytes_beside,
    canvas,
    colour,
    drawn,
    numbers_beside,
    steps_below,
)
from zinf_cli.report.run import Run
from zinf_cli.run_folder.metrics import held_out_of

_MOST_POINTS = 300
"""Points of a curve. Of more steps, each point is the mean of some, in a band from the least of them to the most."""
_FAR = 2.5
"""A line is left out of a figure, and said instead, if it lies as many times as high as all that was measured."""


def learning(runs: Sequence[Run]) -> Iterator[Picture]:
    """Loss, gradient norm and learning rate."""
    yield _loss(runs)
    yield _gradient_norm(runs)
    yield _curves(runs, "lr", "Learning rate", "lr", _short)


def time(runs: Sequence[Run]) -> Iterator[Picture]:
    """Seconds, waiting, traffic, and the experts that tokens reach."""
    yield _seconds(runs)
    yield _curves(runs, "waiting", "Waiting for data, share of a step", "wait_s", _percent, "step_s")
    yield _traffic(runs)
    if any("experts_reached" in line for run in runs for line in run.steps):
        yield _curves(runs, "experts", "Experts that tokens reach", "experts_reached", _percent)


def memory(runs: Sequence[Run]) -> Iterator[Picture]:
    """The peak of each step on each tier, beside the plan and the budget."""
    tiers = {"device": "Accelerator memory", "cpu": "CPU memory", "nvme": "NVMe"}
    for tier, title in tiers.items():
        if tier != "device" or any(run.plan and run.plan.figures.machine.accelerators for run in runs):
            yield _memory(runs, tier, f"{title} of rank 0, peak of a step")


def _short(rate: float) -> str:
    return f"{rate:.3g}".replace("e-0", "e-")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _pens(runs: Sequence[Run]) -> Iterator[tuple[Run, str, str]]:
    """(run, its colour, what a legend's entry of it begins with)."""
    for number, run in enumerate(runs):
        yield run, PALETTE[number], f"{run.name}: " if len(runs) > 1 else ""


def _second(runs: Sequence[Run], role: str) -> str:
    """The colour of a run's second curve."""
    return PALETTE[1] if len(runs) == 1 else role


def _figure(name: str, runs: Sequence[Run]) -> Axes:
    axes = canvas(400, 240)
    axes.figure.set_gid(f"figure-{name}")
    steps_below(axes, max((run.lines[-1]["step"] for run in runs if run.lines), default=1))
    return axes


def _draw(axes: Axes, name: str, role: str, steps: np.ndarray, values: np.ndarray) -> None:
    """A curve; of many steps a mean, in a band of all values."""
    if len(steps) > _MOST_POINTS:
        steps, values, low, high = _thinned(steps, values)
        axes.fill_between(steps, low, high, color=colour(role), alpha=0.18, linewidth=0)
    (line,) = axes.plot(steps, values, color=colour(role), marker="o" if len(steps) == 1 else "")
    line.set_gid(f"curve-{name}")


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(steps, mean, least, most) of as many runs of neighbours as a figure has points, all float64.

    What is not finite is left out.
    """
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    starts = np.linspace(0, len(steps), min(_MOST_POINTS, len(steps)), endpoint=False, dtype=np.int64)
    counts = np.diff(np.append(starts, len(steps)))
    if not len(starts):
        return steps, values, values, values
    mean_of = [np.add.reduceat(part, starts) / counts for part in (steps, values)]
    return mean_of[0], mean_of[1], np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)


def _loss(runs: Sequence[Run]) -> Picture:
    axes, legend = _figure("loss", runs), []
    for number, (run, role, name) in enumerate(_pens(runs)):
        _draw(axes, f"loss-{number}", role, *run.curve("loss"))
        legend.append(Mark(role, "line", f"{name}loss"))
        for place, text in enumerate(run.held_out):
            mark = role if len(runs) > 1 else PALETTE[1 + place % (len(PALETTE) - 1)]
            steps, held_out = run.curve(held_out_of(text))
            (line,) = axes.plot(steps, held_out, color=colour(mark), linestyle=(0, (3, 2)), marker="o", markersize=4)
            line.set_gid(f"curve-eval_loss-{number}" + (f"-{place}" if text else ""))
            legend.append(Mark(mark, "dots", f"{name}held-out{f', {text}' if text else ''}"))
        gone, _ = _not_finite(run, "loss")
        if len(gone):
            axes.plot(gone, np.full(len(gone), 0.02), "x", color=colour("bad"), transform=axes.get_xaxis_transform())
            legend.append(Mark("bad", "cross", f"{name}skipped, or not finite"))
    numbers_beside(axes, lambda value: f"{value:.6g}")
    return Picture("loss", "Loss", drawn(axes), tuple(legend))


def _not_finite(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    steps, values = run.curve(key)
    return steps[~np.isfinite(values)], values[~np.isfinite(values)]


def _gradient_norm(runs: Sequence[Run]) -> Picture:
    """With the limit that clips, and the steps that were clipped."""
    axes, legend = _figure("grad_norm", runs), []
    for number, (run, role, name) in enumerate(_pens(runs)):
        steps, norms = run.curve("grad_norm")
        _draw(axes, f"grad_norm-{number}", role, steps, norms)
        limit = run.recipe.get("train.max_grad_norm")
        clipped = norms > limit if isinstance(limit, int | float) else np.zeros(len(norms), dtype=bool)
        count = int(clipped.sum())
        legend.append(Mark(role, "line", f"{name}norm before clipping"))
        if count:
            second = _second(runs, role)
            if len(steps) <= _MOST_POINTS:
                axes.plot(steps[clipped], norms[clipped], "o", color=colour(second), markersize=4)
            axes.axhline(float(limit or 0), color=colour(second), linewidth=1, linestyle=(0, (4, 3)))
            legend.append(Mark(second, "dots", f"{name}{count} of {len(steps)} clipped to {limit:g}"))
    axes.set_ylim(bottom=0)
    numbers_beside(axes, lambda value: f"{value:.6g}")
    return Picture("grad_norm", "Gradient norm", drawn(axes), tuple(legend))


def _curves(
    runs: Sequence[Run], name: str, title: str, key: str, shown: Callable[[float], str], per: str | None = None
) -> Picture:
    """One curve of each run, from 0 up."""
    axes = _figure(name, runs)
    for number, (run, role, _) in enumerate(_pens(runs)):
        _draw(axes, f"{name}-{number}", role, *run.curve(key, per))
    axes.set_ylim(0, max(axes.get_ylim()[1], 1e-12))
    numbers_beside(axes, shown)
    return Picture(name, title, drawn(axes), _names(runs))


def _names(runs: Sequence[Run]) -> tuple[Mark, ...]:
    """A legend that tells runs apart."""
    return tuple(Mark(role, "line", run.name) for run, role, _ in _pens(runs)) if len(runs) > 1 else ()


def _seconds(runs: Sequence[Run]) -> Picture:
    axes, legend = _figure("step_s", runs), []
    top = _top(runs, "step_s")
    for number, (run, role, name) in enumerate(_pens(runs)):
        _draw(axes, f"step_s-{number}", role, *run.curve("step_s"))
        legend.append(Mark(role, "line", f"{name}measured"))
        if run.plan is not None:
            for text, seconds in _planned(run.plan.step_s, run.plan.calm_step_s, format_seconds).items():
                legend.append(_level(axes, _second(runs, role), seconds, top, f"{name}{text}", format_seconds(seconds)))
    axes.set_ylim(0, top * 1.15)
    numbers_beside(axes, lambda value: f"{value:.3g} s")
    return Picture("step_s", "Seconds a step", drawn(axes), tuple(legend))


def _planned(clipped: float, unclipped: float, said: Callable[[float], str]) -> dict[str, float]:
    """What was planned, and what where nothing is clipped, if that is told apart."""
    return {"planned": clipped} | ({"where nothing is clipped": unclipped} if said(unclipped) != said(clipped) else {})


def _level(axes: Axes, role: str, height: float, top: float, text: str, said: str) -> Mark:
    """A dashed line; said in the legend alone where it lies far above what is drawn."""
    if height > top:
        return Mark(role, "dashes", f"{text} {said} (above)")
    axes.axhline(height, color=colour(role), linewidth=1.2, linestyle=(0, (4, 3)))
    return Mark(role, "dashes", f"{text} {said}")


def _top(runs: Sequence[Run], *keys: str, planned: Sequence[float] = ()) -> float:
    """The height of a figure: that of what was measured, and of lines that do not lie far above it."""
    highest = 0.0
    for run in runs:
        sums = [run.curve(key)[1] for key in keys]
        if len(sums[0]):
            highest = max(highest, float(np.nanmax(sum(sums), initial=0.0)))
    lines = [run.plan.step_s for run in runs if run.plan is not None] if keys == ("step_s",) else planned
    return max([highest, *(line for line in lines if line <= _FAR * highest)]) or max([1.0, *lines])


def _traffic(runs: Sequence[Run]) -> Picture:
    """What is read and written in a step. Alone, a run shows which is which."""
    keys = ("nvme_read_bytes", "nvme_write_bytes")
    planned = [run.plan.nvme_traffic_clipped for run in runs if run.plan is not None]
    axes, legend, top = _figure("traffic", runs), [], _top(runs, *keys, planned=planned)
    for number, (run, role, name) in enumerate(_pens(runs)):
        steps, read = run.curve(keys[0])
        _, written = run.curve(keys[1])
        if len(runs) == 1 and len(steps) <= _MOST_POINTS:
            axes.stackplot(steps, read, written, colors=[colour("blue"), colour("teal")], alpha=0.35)
            legend += [Mark("blue", "area", "read"), Mark("teal", "area", "written")]
        _draw(axes, f"traffic-{number}", role, steps, read + written)
        legend.append(Mark(role, "line", f"{name}both"))
        if run.plan is not None:
            for text, moved in _planned(run.plan.nvme_traffic_clipped, run.plan.nvme_traffic, format_bytes).items():
                legend.append(_level(axes, _second(runs, role), moved, top, f"{name}{text}", format_bytes(moved)))
    bytes_beside(axes, top * 1.15)
    return Picture("traffic", "NVMe traffic of rank 0, a step", drawn(axes), tuple(legend))


def _memory(runs: Sequence[Run], tier: str, title: str) -> Picture:
    planned, allowed = ([_levels(run, tier)[n] for run in runs] for n in (0, 1))
    known = [level for level in (*planned, *allowed) if level]
    axes, legend, top = _figure(tier, runs), [], _top(runs, f"{tier}_bytes", planned=known)
    for number, (run, role, name) in enumerate(_pens(runs)):
        _draw(axes, f"{tier}-{number}", role, *run.curve(f"{tier}_bytes"))
        legend.append(Mark(role, "line", f"{name}measured"))
        for level, text, own in ((planned[number], "planned", "orange"), (allowed[number], "may use", "bad")):
            if level:
                mark = own if len(runs) == 1 else role
                legend.append(_level(axes, mark, level, top, f"{name}{text}", format_bytes(level)))
    bytes_beside(axes, top * 1.15)
    return Picture(tier, title, drawn(axes), tuple(legend))


def _levels(run: Run, tier: str) -> tuple[float, float]:
    """(planned, allowed) bytes of one rank; 0 where that is not known."""
    if run.plan is None:
        return 0.0, 0.0
    planned = sum(line.num_bytes for line in run.plan.lines if line.tier == tier)
    limits = [limit.allowed for limit in run.plan.limits if limit.tier == tier]
    return planned, limits[0] / run.plan.figures.ranks_at(tier) if limits else 0.0
