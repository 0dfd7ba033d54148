"""What happened, in words and numbers: the first thing that a page shows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zinf_cli.amounts import format_bytes, format_count, format_number, format_seconds
from zinf_cli.report.run import Run
from zinf_cli.run_folder.metrics import ACCURACY, HELD_OUT, held_out_of


@dataclass(frozen=True)
class Fact:
    """A number of a run, and what stands beside it: where it began, or what was planned."""

    label: str
    value: str
    beside: str = ""


def headline(run: Run) -> str:
    """How the run ended, and after how many steps."""
    done = run.lines[-1]["step"] if run.lines else 0
    of = "" if run.plan is None else f" of {run.plan.max_steps}"
    skipped = run.summary.get("skipped_steps")
    words = f"{run.status} after {done}{of} steps" + (f", {skipped} of them skipped" if skipped else "")
    since = run.summary.get("resumed_from_step")
    return words + (f", begun from the checkpoint of step {since}" if since else "")


def described(run: Run) -> str:
    """Model, precision and place."""
    if run.plan is None:
        return "its plan is missing, or another zinf's"
    model, ranks = run.plan.figures.model, run.plan.world_size
    kind = "accelerator" if run.plan.figures.machine.accelerators else "CPU"
    hosts = f" on {len(run.plan.hosts)} hosts" if len(run.plan.hosts) > 1 else ""
    return (
        f"{model.architecture}, {format_count(model.num_params)} parameters, {run.plan.precision}, "
        f"{ranks} {kind} {'rank' if ranks == 1 else 'ranks'}{hosts}"
    )


def facts(run: Run) -> Iterator[Fact]:
    """The numbers of a run that are known, in one order for all runs."""
    predicted = run.summary.get("predicted") or {}
    texts = {
        f"held-out {word}{f', {text}' if text else ''}": held_out_of(text, what)
        for word, what in (("loss", HELD_OUT), ("accuracy", ACCURACY))
        for text in run.held_out
    }
    for label, key in {"loss": "loss", **texts}.items():
        values = [line[key] for line in run.lines if line.get(key) is not None]
        if values:
            yield Fact(label, f"{values[-1]:.4f}", f"from {values[0]:.4f}" if len(values) > 1 else "")
    rows: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("seconds a step", "step_s", format_seconds),
        ("tokens a second", "tokens_per_s", format_number),
        ("waiting for data", "wait_share", lambda value: f"{100 * value:.0f} %"),
        ("accelerator memory", "device_bytes", format_bytes),
        ("CPU memory", "cpu_bytes", format_bytes),
        ("on NVMe, a rank", "nvme_bytes", format_bytes),
    )
    accelerated = run.plan is not None and run.plan.figures.machine.accelerators > 0
    for label, key, shown in rows:
        value, planned = _measured(run, key), predicted.get(key)
        used = key != "nvme_bytes" or value or planned
        if value is not None and used and (accelerated or key != "device_bytes"):
            yield Fact(label, shown(value), "" if planned is None else f"planned {shown(planned)}")


def _measured(run: Run, key: str) -> float | None:
    """As the summary has it; of a run without one, the median of steps, or the peak of bytes."""
    if run.summary:
        value = (run.summary.get("measured") or {}).get(key)
        return value if isinstance(value, int | float) else None
    if key == "wait_share":
        values = [line["wait_s"] / line["step_s"] for line in run.steps if line["step_s"]]
    else:
        values = [line[key] for line in run.steps]
    return (max if key.endswith("_bytes") else statistics.median)(values) if values else None


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of the recipe's keys that are not the same in all runs."""
    recipes = [dict(_leaves(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [(key, [_shown(recipe.get(key)) for recipe in recipes]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _leaves(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Its keys and values, those of what a single key holds (model.config) each by itself."""
    for key, value in recipe.items():
        if isinstance(value, dict) and value:
            for inner, held in _leaves(value):
                yield f"{key}.{inner}", held
        else:
            yield key, value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
