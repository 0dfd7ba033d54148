"""`python -m benchmarks.gpu`: zinf on an accelerator, its state off it, beside plain PyTorch and FSDP2.

The sizes follow from what the machine has free, and what is left out is said (choice.py). All of it takes 7 minutes at
most. Without an accelerator this is a rehearsal on the CPU, with a small model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.accelerator import Accelerator, find_accelerator
from benchmarks.case import Case
from benchmarks.choice import Machine, Trial, Way, choose
from benchmarks.contenders import WARM_UP, environment, launch_command
from benchmarks.drive import drive_rate
from benchmarks.limited import Ended, run_limited
from benchmarks.results import add_save, report
from zinf_cli.amounts import format_bytes
from zinf_cli.machine.hardware import available_memory, drive_space

STEPS = 2
CASE, MODELS, SMALLER = Case(16, 2048), ("3B", "8B"), ("1B", "216M")
REHEARSAL, REHEARSED = Case(2, 64), ("2M",)
MOST_S = 420.0
"""Of all runs."""
LEAST_S = 30.0
"""A run that has less time left is not begun."""
STEP_SHARE = 1 / 40
"""Of the time of all runs, what a step may take for its drive alone."""
DOES_NOT_FIT = 4
"""The exit status of a launch whose plan does not fit."""
PROGRAMS = {"plain PyTorch": "benchmarks.plain", "FSDP2 with CPU offload": "benchmarks.fsdp2"}


def main() -> None:
    parser = argparse.ArgumentParser(description="zinf on an accelerator beside plain PyTorch and FSDP2.")
    parser.add_argument("--seconds", type=float, default=MOST_S, help="what all runs may take (default: %(default)s)")
    add_save(parser)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    root = Path("runs")
    root.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=root)).absolute()
    try:
        accelerator = find_accelerator()
        on_gpu = accelerator.name is not None
        drive = drive_rate(folder)
        machine = Machine(
            accelerator.free_bytes if on_gpu else None, available_memory(), drive_space(folder).free_bytes, drive
        )
        print(_header(accelerator, machine), flush=True)
        longest_step_s = arguments.seconds * STEP_SHARE
        if on_gpu:
            trials, left_out = choose(machine, CASE, MODELS, SMALLER, longest_step_s)
        else:
            trials, left_out = choose(machine, REHEARSAL, REHEARSED, (), longest_step_s)
        for line in left_out:
            print(f"left out: {line}", flush=True)
        rows, measured = _tried(trials, accelerator, folder, end)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    case = str(CASE if on_gpu else REHEARSAL) + ("" if on_gpu else ", rehearsal on the CPU")
    note = f"matrix products: {accelerator.matmul_flops / 1e12:.3g} TFLOP/s"
    facts = {"machine": asdict(machine), "accelerator": asdict(accelerator), "left_out": left_out, "runs": measured}
    to = None if arguments.save else root / "gpu-check"
    report(case, rows, save=True, note=note, measured=facts, folder=to)
    if not all("step_s" in row for row in rows):
        sys.exit("error: not every run has come to its end; the table says why")


def _header(accelerator: Accelerator, machine: Machine) -> str:
    device = f"{accelerator.name}, {format_bytes(accelerator.free_bytes)} free"
    return "\n".join(
        (
            device if accelerator.name else "no accelerator here: a rehearsal on the CPU, with a small model",
            f"CPU memory: {format_bytes(machine.cpu)} free, {len(os.sched_getaffinity(0))} cores",
            f"drive: {format_bytes(machine.drive)} free, {machine.drive_bytes_per_s / 1e9:.2f} GB/s to and from it",
            f"matrix products: {accelerator.matmul_flops / 1e12:.3g} TFLOP/s",
        )
    )


def _tried(
    trials: Sequence[Trial], accelerator: Accelerator, folder: Path, end: float
) -> tuple[list[dict[str, Any]], list[Any]]:
    """A row for each trial, and what it was made from. Each is printed as it comes."""
    rows: list[dict[str, Any]] = []
    measured: list[Any] = []
    for number, trial in enumerate(trials):
        way, ended = trial.ways[0], None
        for attempt, way in enumerate(trial.ways):
            own = folder / f"{number}-{attempt}"
            own.mkdir()
            limit = end - time.monotonic()
            ended = _run(way, trial.case, own, limit, accelerator) if limit >= LEAST_S else None
            shutil.rmtree(own)
            if ended is None or ended.code != DOES_NOT_FIT:
                break
        row = _row(way, trial.case, ended, accelerator)
        rows.append(row)
        measured.append({**row, "steps": ended.steps if ended else [], "exit_status": ended.code if ended else None})
        print(_line(row))
        if ended is not None and ended.code not in (0, None):
            print(ended.said[-3000:])
        sys.stdout.flush()
    return rows, measured


def _line(row: Mapping[str, Any]) -> str:
    """A row as it comes: should all be cut short, these lines are what there is."""
    told = (f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items() if value)
    return "; ".join(told)


def _run(way: Way, case: Case, folder: Path, limit_s: float, accelerator: Accelerator) -> Ended:
    steps = WARM_UP + STEPS
    if way.contender == "zinf":
        command, run_dir = launch_command(case, way.tiers, steps, folder)
        return run_limited(command, environment(folder), run_dir / "metrics.jsonl", limit_s)
    steps_file = folder / "steps.jsonl"
    command = [sys.executable, "-m", PROGRAMS[way.contender], str(steps_file), json.dumps(asdict(case)), str(steps)]
    command.append("cuda:0" if accelerator.name else "cpu")
    return run_limited(command, os.environ, steps_file, limit_s)


def _row(way: Way, case: Case, ended: Ended | None, accelerator: Accelerator) -> dict[str, Any]:
    """Medians of the steps that count; what has become of the run where there are none."""
    row: dict[str, Any] = {"contender": way.contender, "model": case.model, "states_on": way.states_on}
    steps = ended.steps[WARM_UP:] if ended else []
    if ended is None or not steps:
        return {**row, "outcome": _outcome(ended)}
    step_s = _median(steps, "step_s")
    rate = case.micro_batches * case.tokens / step_s
    flops = rate * case.flops_per_token
    waits = [step["wait_s"] / step["step_s"] for step in steps if "wait_s" in step]
    return {
        **row,
        "step_s": step_s,
        "tokens_per_second": rate,
        "TFLOP/s": flops / 1e12,
        "of_matmul_share": flops / accelerator.matmul_flops,
        "device_memory_bytes": ended.steps[-1].get("gpu_mem_bytes"),
        "host_memory_bytes": ended.host_bytes,
        "waiting_share": statistics.median(waits) if waits else None,
        **({} if ended.code == 0 else {"outcome": _outcome(ended)}),
    }


def _outcome(ended: Ended | None) -> str:
    if ended is None:
        return "not begun: no time was left"
    if ended.code is None:
        return f"its time was up after {len(ended.steps)} steps"
    errors = [line for line in ended.said.splitlines() if line.strip()]
    return f"ended with {ended.code}: {errors[-1][:200] if errors else ''}"


def _median(steps: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(statistics.median(step[key] for step in steps))


if __name__ == "__main__":
    main()
