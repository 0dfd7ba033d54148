"""`python -m benchmarks.run`: the table of benchmarks/README.md, contenders alternating on one machine.

Times are ratios to plain PyTorch of the same run: absolute times of a shared machine mean little.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.case import NEVER_CLIPS, Case
from benchmarks.contenders import CONTENDERS
from benchmarks.watch import Watched
from zinf_cli.amounts import format_bytes
from zinf_cli.bench.nvme import READ, WRITE, Bench, Point, open_files

ALWAYS = ("plain", "zinf-cpu", "zinf-nvme")
CASES = {
    f"{micro_batches}x{tokens}{suffix}": Case(micro_batches, tokens, **more)
    for micro_batches, tokens in ((8, 16), (8, 64), (1, 16))
    for suffix, more in (("", {}), ("-never-clips", {"clip": NEVER_CLIPS}), ("-unclipped", {"clip": None}))
} | {
    "8x64-kept": Case(8, 64, checkpointing=False),
    "8x64-kept-never-clips": Case(8, 64, checkpointing=False, clip=NEVER_CLIPS),
    "8x16-layers": Case(8, 16, model="3 times the layers"),
}
SWEEP = tuple(Case(count, 16) for count in (1, 2, 4, 8, 16))
LOSS_TOLERANCE = 1e-3
DRIVE_BYTES = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description="zinf beside plain PyTorch and DeepSpeed.")
    parser.add_argument("--cases", nargs="*", default=[], choices=[*CASES, "sweep"], help="all but sweep")
    parser.add_argument("--contenders", nargs="*", default=ALWAYS, choices=CONTENDERS, help="the first is the base")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contender, in turn")
    parser.add_argument("--folder", type=Path, default=None, help="where the drive is (default: runs/)")
    arguments = parser.parse_args()
    names = arguments.cases or list(CASES)
    cases = [case for name in names for case in (SWEEP if name == "sweep" else (CASES[name],))]
    console = Console(width=140)
    console.print(f"{time.strftime('%Y-%m-%d')}, {_machine()}, torch {torch.__version__}", highlight=False)
    root = arguments.folder or Path("runs")
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=root)).absolute()
    try:
        for case in cases:
            runs: dict[str, list[Watched]] = {name: [] for name in arguments.contenders}
            drive = [_drive(folder)]
            for _ in range(arguments.rounds):
                for name in runs:
                    runs[name].append(CONTENDERS[name](case, arguments.steps, folder))
                    drive.append(_drive(folder))
            console.print(_table(case, runs))
            _compare_with_limit(console, runs, statistics.median(drive))
            _compare_losses(console, runs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _drive(folder: Path) -> float:
    """Bytes per second of the drive now, reading and writing at once, with the threads and blocks a run has."""
    with open_files([folder], DRIVE_BYTES) as files:
        bench = Bench(files, lambda doing, num_bytes: None)
        points = [Point(direction, 4 * 2**20, 2, 0.0) for direction in (WRITE, READ)]
        bench.run(WRITE, DRIVE_BYTES, points[0].block_size, points[0].threads, "filling")
        return bench.both(points[1], points[0], DRIVE_BYTES)


def _table(case: Case, runs: dict[str, list[Watched]]) -> Table:
    title = f"{case} tokens, {case.num_params / 1e6:.0f}M parameters, fp32"
    table = Table("contender", title=title, title_justify="left")
    for heading in ("s/step (median)", "ratio", "waiting", "peak memory", "read/step", "written/step", "B/param"):
        table.add_column(heading, justify="right")
    base = statistics.median(_steps(next(iter(runs.values()))))
    for name, watched in runs.items():
        steps = _steps(watched)
        waits = [wait for run in watched for wait in run.wait_s]
        read = statistics.median(run.read_bytes for run in watched)
        written = statistics.median(run.write_bytes for run in watched)
        table.add_row(
            name,
            f"{statistics.median(steps):.2f}",
            f"{statistics.median(steps) / base:.2f}",
            f"{100 * sum(waits) / sum(steps):.0f} %" if waits else "",
            format_bytes(max(run.peak_bytes for run in watched)),
            format_bytes(read),
            format_bytes(written),
            f"{(read + written) / case.num_params:.1f}",
        )
    return table


def _compare_with_limit(console: Console, runs: dict[str, list[Watched]], drive: float) -> None:
    """zinf on the drive beside what nothing could beat: its compute alone, or its bytes at the drive's rate."""
    line = f"the drive, reading and writing at once: {drive / 1e9:.2f} GB/s"
    if runs.get("zinf-nvme") and runs.get("zinf-cpu"):
        compute = statistics.median(_steps(runs["zinf-cpu"]))
        moving = statistics.median(run.read_bytes + run.write_bytes for run in runs["zinf-nvme"]) / drive
        ours = statistics.median(_steps(runs["zinf-nvme"]))
        line += f"; compute alone {compute:.2f} s, zinf-nvme's bytes at that rate {moving:.2f} s"
        line += f"; zinf-nvme takes {ours / max(compute, moving):.2f} times the larger"
    console.print(line, highlight=False)


def _compare_losses(console: Console, runs: dict[str, list[Watched]]) -> None:
    """DeepSpeed trains on the windows and from the weights of plain PyTorch, so their losses must agree."""
    for name in ("deepspeed", "deepspeed-small"):
        if name in runs and "plain" in runs:
            pairs = zip(runs["plain"][0].loss, runs[name][0].loss, strict=True)
            apart = max(abs(ours - theirs) for ours, theirs in pairs)
            verdict = "" if apart <= LOSS_TOLERANCE else ": NOT the same training"
            console.print(f"losses of {name} and plain: at most {apart:.1e} apart{verdict}", highlight=False)


def _steps(watched: list[Watched]) -> list[float]:
    return [step for run in watched for step in run.step_s]


def _machine() -> str:
    return f"{len(os.sched_getaffinity(0))} cores of {platform.machine()}"


if __name__ == "__main__":
    main()
