"""Writes the reports at a run's end: summary.json, and the traces of all ranks in one file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from zinf_cli.durable import write_durably
from zinf_cli.launch.failure import Failure
from zinf_cli.launch.runner import Outcome
from zinf_cli.plan.plan import Plan
from zinf_cli.plan.traffic import experts_reached
from zinf_cli.plan.wear import step_bytes
from zinf_cli.run_folder.metrics import ACCURACY, HELD_OUT, Watch, sequences_of
from zinf_cli.run_folder.names import LOGS, TRACE, files_of_ranks


def summarise(plan: Plan, watch: Watch, outcome: Outcome) -> dict[str, Any]:
    """The content of summary.json: how the run ended, totals, and the plan beside what was measured.

    Totals and losses are of the whole run. What is held against the plan are the steps of this launch alone: before it,
    the run may have had another plan.
    """
    status = "interrupted" if outcome.ended_as_asked else "failed" if outcome.failure else "done"
    steps = [line for line in watch.lines if "loss" in line]
    trained = [line for line in steps if not line.get("skipped")]
    launched = [line for line in steps if line["step"] > (watch.first_step or 0)]
    steady = _steady([line for line in launched if not line.get("skipped")])
    measured = _measured(launched, steady, plan, outcome)
    wait_share, moments = measured["wait_share"], plan.figures.optimizer.state_dtype
    return {
        "status": status,
        **_told(outcome.failure),
        "steps": len(steps),
        "skipped_steps": len(steps) - len(trained),
        "resumed_from_step": watch.first_step or None,
        "max_steps": plan.max_steps,
        "tokens": sum(line["tokens"] for line in steps),
        "sources": _sources(plan, steps),
        **_first_and_last("loss", [line["loss"] for line in trained]),
        **_first_and_last(HELD_OUT, [line[HELD_OUT] for line in watch.lines if HELD_OUT in line]),
        "best_eval": _best(watch.lines),
        "held_out": _held_out(watch.lines, HELD_OUT),
        "perplexity": plan.figures.data.of_tokens,
        "accuracy": _accuracy(watch.lines),
        "bottleneck": None if wait_share is None else "nvme" if wait_share > 0.5 else "compute",
        "endurance_bytes": plan.endurance_bytes,
        "moments": moments if moments == "fp32" else f"{moments}, rounded",
        "measured": measured,
        "predicted": _predicted(plan, len(launched), steady),
    }


def _measured(
    steps: Sequence[dict[str, Any]], steady: Sequence[dict[str, Any]], plan: Plan, outcome: Outcome
) -> dict[str, Any]:
    """Peaks and sums of `steps`, medians of those that are `steady`."""

    def median(values: Iterable[float]) -> float | None:
        found = list(values)
        return statistics.median(found) if found else None

    def most(key: str) -> int | None:
        return max((line[key] for line in steps), default=None)

    return {
        **{key: median(line[key] for line in steady) for key in ("step_s", "tokens_per_s", "tflops_per_rank")},
        "wait_share": median(line["wait_s"] / line["step_s"] for line in steady),
        "host_cpu_bytes": outcome.host_cpu_bytes,
        **{key: most(key) for key in ("cpu_bytes", "device_bytes", "nvme_bytes")},
        "nvme_traffic": median(line["nvme_read_bytes"] + line["nvme_write_bytes"] for line in steady),
        "drives_written": plan.figures.ranks_per_host * sum(line["nvme_write_bytes"] for line in steps),
        "experts_reached": median(line["experts_reached"] for line in steady if "experts_reached" in line),
    }


def _predicted(plan: Plan, steps: int, steady: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The plan of a run of `steps` steps, and of those that are compared."""
    unclipped = [_unclipped(line) for line in steady]
    traffic = [plan.nvme_traffic if each else plan.nvme_traffic_clipped for each in unclipped]
    step_s = [plan.calm_step_s if each else plan.step_s for each in unclipped]
    if (saved := plan.checkpoint) is not None and saved.interval == 1:  # else most steps have none
        traffic = [num_bytes + saved.traffic // plan.world_size for num_bytes in traffic]
        step_s = [saved.step_s] * len(step_s)
    return {
        "step_s": statistics.median(step_s) if step_s else plan.step_s,
        "wait_share": max(0.0, 1 - plan.busy["compute"]),  # the sum of a busy lane may round up to more
        "bottleneck": plan.bottleneck,
        "device_bytes": next((limit.needed for limit in plan.limits if limit.tier == "device"), None),
        "host_cpu_bytes": next(limit.needed for limit in plan.limits if limit.tier == "cpu"),
        "cpu_bytes": plan.cpu_bytes_per_rank,
        "nvme_bytes": plan.nvme_bytes,
        "nvme_traffic": statistics.median(traffic) if traffic else plan.nvme_traffic,
        "drives_written": steps * step_bytes(plan),
        "experts_reached": experts_reached(plan.figures, plan.choice, -(-plan.micro_batches // plan.per_sweep)),
    }


def _first_and_last(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {f"first_{name}": values[0] if values else None, f"last_{name}": values[-1] if values else None}


def _best(lines: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """The step with the lowest held-out loss, before any step excepted, and that loss."""
    losses = {line["step"]: line[HELD_OUT] for line in lines if line["step"] and line.get(HELD_OUT) is not None}
    step = min(losses, key=lambda step: losses[step], default=None)
    return None if step is None else {"step": step, "eval_loss": losses[step]}


def _held_out(lines: Sequence[dict[str, Any]], what: str) -> dict[str, list[float | None]]:
    """Of each held-out text that has a name: the first and the last loss, or `what` else."""
    keys = [key for line in lines[-1:] for key in line if key.startswith(f"{what}/")]
    found = {key: [line[key] for line in lines if key in line] for key in keys}
    return {key.removeprefix(f"{what}/"): [of_it[0], of_it[-1]] for key, of_it in found.items()}


def _accuracy(lines: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """The first and the last share of right choices: of all held-out texts (""), and of each that has a name."""
    of_all = [line[ACCURACY] for line in lines if ACCURACY in line]
    return {"": [of_all[0], of_all[-1]], **_held_out(lines, ACCURACY)} if of_all else {}


def _sources(plan: Plan, steps: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many sequences each text with a weight gave, by its path."""
    paths = plan.figures.data.sources
    return {path: sum(line.get(sequences_of(n), 0) for line in steps) for n, path in enumerate(paths)}


def _told(failure: Failure | None) -> dict[str, Any]:
    """The first failure: what it was, whose, and where its log is in the run's folder."""
    if failure is None:
        return {"error": None}
    log = f"{LOGS}/{failure.log.name}"
    return {
        "error": failure.error.line(),
        "first_failure": {"rank": failure.rank, "host": failure.host, "log": log},
    }


def _unclipped(step: dict[str, Any]) -> bool:
    return bool(step["updated_in_backward"])


def _steady(steps: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The steps that follow a step of their kind, clipped or unclipped; all steps, if there is none.

    The plan describes only such steps. A first step has no pending update, and a step of another kind than the last has
    updates in both passes or in none.
    """
    return [step for before, step in pairwise(steps) if _unclipped(before) == _unclipped(step)] or steps


def merge_traces(run_dir: Path) -> None:
    """Write trace.json: the spans of every rank in one document."""
    events = []
    paths = files_of_ranks(run_dir, "trace")
    for path in paths:
        events += json.loads(path.read_text())["traceEvents"]
    write_durably(run_dir / TRACE, json.dumps({"traceEvents": events}))
    for path in paths:
        path.unlink()
