"""`python -m benchmarks.checkpoints`: what a checkpoint costs the steps around it, all state on NVMe.

A run takes a checkpoint every fourth step and keeps one. Updates write its state in the step after
(engine/traffic/destination.py). fsync, manifest and the removal of the checkpoint before are under way in that step and
the next. So each checkpoint has two steps of its own, and two without one to be compared with. The last checkpoint is
verified.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from benchmarks.contenders import environment, launch_command
from benchmarks.results import add_save, report
from benchmarks.run import CASES
from zinf_cli.checkpoint.folder import checkpoints_of
from zinf_cli.checkpoint.verify import verify

INTERVAL = 4


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps with a checkpoint beside steps without.")
    parser.add_argument("--cases", nargs="*", default=["8x16", "8x16-never-clips"], choices=CASES)
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the drive is")
    add_save(parser)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases:
        folder = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.folder)).absolute()
        try:
            steps = (arguments.checkpoints + 1) * INTERVAL
            command, run_dir = launch_command(CASES[name], "nvme", steps, folder)
            command += [f"checkpoint.interval={INTERVAL}", "checkpoint.keep_latest_k=1"]
            subprocess.run(command, env=environment(folder), check=True, capture_output=True)
            seconds = [json.loads(line)["step_s"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            problems = [verdict.problem for path in checkpoints_of(run_dir) for verdict in verify(path)]
            assert len(problems) > 1
            assert not any(problems), problems
            report(str(CASES[name]), [_ratios(seconds)], arguments.save, measured=seconds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _ratios(seconds: list[float]) -> dict[str, float]:
    """Of the step that is saved, of the next, and of both; each to the mean of the two others before the next one."""
    saved, after = [], []
    for first in range(INTERVAL - 1, len(seconds) - INTERVAL, INTERVAL):
        with_one, without = seconds[first : first + 2], statistics.mean(seconds[first + 2 : first + INTERVAL])
        saved.append(with_one[0] / without)
        after.append(with_one[1] / without)
    both = [(one + other) / 2 for one, other in zip(saved, after, strict=True)]
    ratios = {"step_saved": saved, "next_step": after, "mean_of_both": both}
    return {name: statistics.median(values) for name, values in ratios.items()} | {"pairs": len(both)}


if __name__ == "__main__":
    main()
