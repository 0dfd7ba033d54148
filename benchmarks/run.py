"""`python -m benchmarks.run`: zinf beside plain PyTorch and DeepSpeed, in turn on one machine.

Times are ratios to plain PyTorch of the same run: absolute times of a shared machine mean little.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.case import NEVER_CLIPS, Case
from benchmarks.contenders import CONTENDERS
from benchmarks.drive import bench_hardware, drive_rate
from benchmarks.results import add_save, report
from benchmarks.watch import Watched

ALWAYS = ("plain", "zinf-cpu", "zinf-nvme")
CASES = {
    f"{micro_batches}x{tokens}{suffix}": Case(micro_batches, tokens, **more)
    for micro_batches, tokens in ((8, 16), (8, 64), (1, 16))
    for suffix, more in (("", {}), ("-never-clips", {"clip": NEVER_CLIPS}), ("-unclipped", {"clip": None}))
} | {
    "8x64-kept": Case(8, 64, checkpointing=False),
    "8x64-kept-never-clips": Case(8, 64, checkpointing=False, clip=NEVER_CLIPS),
    "8x16-layers": Case(8, 16, model="3 times the layers"),
    "8x64-bf16": Case(8, 64, precision="bf16"),
    "8x64-bf16-never-clips": Case(8, 64, precision="bf16", clip=NEVER_CLIPS),
    "8x64-bf16-unclipped": Case(8, 64, precision="bf16", clip=None),
    "8x64-bf16-moments": Case(8, 64, precision="bf16", clip=None, state_dtype="bf16"),
    "8x64-int8-moments": Case(8, 64, precision="bf16", clip=None, state_dtype="int8"),
}
SWEEP = tuple(Case(count, 16) for count in (1, 2, 4, 8, 16))
LOSS_TOLERANCE = 1e-3
MIB, GIB = 2**20, 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description="zinf beside plain PyTorch and DeepSpeed.")
    parser.add_argument("--cases", nargs="*", default=[], choices=[*CASES, "sweep"], help="all but sweep")
    parser.add_argument("--contenders", nargs="*", default=ALWAYS, choices=CONTENDERS, help="the first is the base")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contender, in turn")
    parser.add_argument("--folder", type=Path, default=None, help="where the drive is (default: runs/)")
    add_save(parser)
    arguments = parser.parse_args()
    names = arguments.cases or list(CASES)
    cases = [case for name in names for case in (SWEEP if name == "sweep" else (CASES[name],))]
    root = arguments.folder or Path("runs")
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=root)).absolute()
    try:
        for case in cases:
            runs: dict[str, list[Watched]] = {name: [] for name in arguments.contenders}
            bench_hardware(folder)
            drive = [drive_rate(folder)]
            for _ in range(arguments.rounds):
                for name in runs:
                    runs[name].append(CONTENDERS[name](case, arguments.steps, folder))
                    drive.append(drive_rate(folder))
            measured = {name: [asdict(run) for run in watched] for name, watched in runs.items()}
            report(str(case), _rows(case, runs, statistics.median(drive)), arguments.save, measured=measured)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rows(case: Case, runs: dict[str, list[Watched]], drive: float) -> Sequence[dict[str, Any]]:
    """A row a contender; medians of steps. `drive` is in bytes per second, and stands in the first row."""
    rows: list[dict[str, Any]] = []
    base = statistics.median(_steps(next(iter(runs.values()))))
    for name, watched in runs.items():
        steps = _steps(watched)
        waits = [wait for run in watched for wait in run.wait_s]
        read = statistics.median(run.read_bytes for run in watched)
        written = statistics.median(run.write_bytes for run in watched)
        moved = read + written if read + written >= MIB else 0  # what is less is the files of a run, not its state
        planned = watched[0].planned_bytes
        rows.append(
            {
                "contender": name,
                "step_s": statistics.median(steps),
                "ratio": statistics.median(steps) / base,
                "waiting_share": sum(waits) / sum(steps) if waits else None,
                "peak_memory_bytes": max(run.peak_bytes for run in watched),
                "read_per_step_bytes": read,
                "written_per_step_bytes": written,
                "bytes_per_parameter": _by(case.num_params, moved, planned) if moved else None,
                "cpu_s_per_GiB": statistics.median(run.drive_cpu_s for run in watched) / (moved / GIB)
                if moved
                else None,
                "drive_bytes_per_s": None if rows else drive,
                "limit": _limit(runs, drive) if name == "zinf-nvme" else None,
                "losses_apart": _apart(runs, name),
            }
        )
    return rows


def _by(params: int, moved: float, planned: int | None) -> float | tuple[float, float]:
    """Bytes for each parameter, those of the plan before those that were moved."""
    return moved / params if not planned else (planned / params, moved / params)


def _limit(runs: dict[str, list[Watched]], drive: float) -> float | None:
    """zinf's step on the drive by what nothing could beat: its compute alone, or its bytes at the drive's rate."""
    if not runs.get("zinf-cpu"):
        return None
    compute = statistics.median(_steps(runs["zinf-cpu"]))
    moving = statistics.median(run.read_bytes + run.write_bytes for run in runs["zinf-nvme"]) / drive
    return statistics.median(_steps(runs["zinf-nvme"])) / max(compute, moving)


def _apart(runs: dict[str, list[Watched]], name: str) -> float | None:
    """DeepSpeed trains on the windows and from the weights of plain PyTorch, so their losses must agree."""
    if not name.startswith("deepspeed") or "plain" not in runs:
        return None
    pairs = zip(runs["plain"][0].loss, runs[name][0].loss, strict=True)
    apart = max(abs(ours - theirs) for ours, theirs in pairs)
    if apart > LOSS_TOLERANCE:
        raise SystemExit(f"error: {name} is not the same training: its losses are {apart:.1e} from those of plain")
    return apart


def _steps(watched: list[Watched]) -> list[float]:
    return [step for run in watched for step in run.step_s]


if __name__ == "__main__":
    main()
