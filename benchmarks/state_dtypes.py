"""`python -m benchmarks.state_dtypes`: the losses of the demo's model with moments in fp32, bf16 and int8.

SmolLM2-135M learns the King James text (`make fetch`), 128 tokens a step. Runs differ in `optimizer.state_dtype` alone.
Losses follow neither where state lies nor what else a machine does: all lies in memory, and nothing is timed. A run in
`runs/state-dtypes/` that has all its steps is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.results import add_save, report
from zinf_cli.run_folder.names import METRICS

RUNS = Path("runs/state-dtypes")
DTYPES = ("fp32", "bf16", "int8")
EVERY = 50
"""Steps of which the mean of losses is shown."""
TIERS = ("params", "grads", "optimizer", "activations")


def run(dtype: str, steps: int) -> list[dict[str, Any]]:
    """The lines of metrics of a run, one for each step."""
    folder = RUNS / dtype
    if len(_lines(folder)) < steps:
        keys = {
            "train.seq_len": 64, "train.micro_batch_size": 2, "train.global_batch_size": 2, "train.max_steps": steps,
            "dataset.eval_path": "null", "train.eval_interval": "null", "optimizer.state_dtype": dtype,
            "activation_checkpointing": "none", "logging.interval": 10, "output_dir": folder,
        } | {f"offload.{state}": "cpu" for state in TIERS}  # fmt: skip
        command = [sys.executable, "-m", "zinf_cli.cli", "launch", "recipes/smollm2-135m.yaml"]
        subprocess.run([*command, *(f"{key}={value}" for key, value in keys.items())], check=True)
    return _lines(folder)


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses with moments in fp32, bf16 and int8.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    add_save(parser)
    arguments = parser.parse_args()
    found = {dtype: run(dtype, arguments.steps) for dtype in arguments.dtypes}
    rows: list[dict[str, Any]] = []
    for last in range(EVERY, arguments.steps + 1, EVERY):
        losses = {
            dtype: f"{fmean(line['loss'] for line in lines if last - EVERY < line['step'] <= last):.4f}"
            for dtype, lines in found.items()
        }
        rows.append({"steps": f"{last - EVERY + 1} to {last}", **losses})
    report("SmolLM2-135M, King James text", rows, arguments.save, measured=found)


if __name__ == "__main__":
    main()
