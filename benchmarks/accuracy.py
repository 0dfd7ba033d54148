"""`python -m benchmarks.accuracy`: what the plan predicts beside what a run then does, for recipes that differ.

They differ in size, placement, ranks, sweeps, clipping and recomputation. Times are predicted from what `zinf bench`
finds before each row, because what a shared machine gives changes within minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.case import MODELS
from benchmarks.drive import bench_hardware
from benchmarks.results import add_save, report

SMALL = {**MODELS["216M"], "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
SMALL |= {"num_key_value_heads": 8, "num_hidden_layers": 12}


@dataclass(frozen=True)
class Row:
    """A recipe: its model, and keys."""

    name: str
    config: dict[str, Any]
    keys: tuple[str, ...]
    slots: int = 1


def _nvme(*keys: str) -> tuple[str, ...]:
    return (*(f"offload.{state}=nvme" for state in ("params", "grads", "optimizer", "activations")), *keys)


STEP = ("train.seq_len=64", "train.global_batch_size=8")
ROWS = (
    Row("216M, all NVMe", MODELS["216M"], _nvme(*STEP)),
    Row("216M, all NVMe, not clipped", MODELS["216M"], _nvme(*STEP, "train.max_grad_norm=null")),
    Row("216M, moments on NVMe", MODELS["216M"], ("offload.optimizer=nvme", "offload.params=cpu", *STEP)),
    Row("216M, all CPU, recomputed", MODELS["216M"], ("activation_checkpointing=unit", "offload.optimizer=cpu", *STEP)),
    Row("216M, all NVMe, 4 sweeps", MODELS["216M"], _nvme(*STEP, "train.micro_batches_per_sweep=2")),
    Row("216M, in 2.2 GiB", MODELS["216M"], ("offload.cpu_memory=2.2GiB", *STEP)),
    Row("50M, all NVMe, 2 ranks", SMALL, _nvme(*STEP), slots=2),
    Row("50M, all CPU", SMALL, ("train.seq_len=128", "train.global_batch_size=4")),
    *(
        Row(
            f"216M, 1×16 in {budget} GiB{', not clipped' if clip == 'null' else ''}",
            MODELS["216M"],
            (
                f"offload.cpu_memory={budget}GiB",
                "train.seq_len=16",
                "train.global_batch_size=1",
                f"train.max_grad_norm={clip}",
            ),
        )
        for clip in ("1.0", "null")
        for budget in (1.2, 1.6, 2.4, 3.2)
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted beside measured.")
    parser.add_argument("--rows", nargs="*", type=int, default=range(len(ROWS)), help="numbers of the rows, from 0")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the drive is")
    add_save(parser)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="accuracy-", dir=arguments.folder)).absolute()
    try:
        for number in arguments.rows:
            bench_hardware(folder)
            summary = _run(ROWS[number], arguments.steps, folder)
            report(ROWS[number].name, [_row(summary)], arguments.save)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(row: Row, steps: int, folder: Path) -> dict[str, Any]:
    """The summary of a run."""
    np.save(folder / "tokens.npy", np.arange(1 << 16) * 7 % 8000)
    recipe = {
        "model": {"config": row.config},
        "dataset": {"path": str(folder / "tokens.npy")},
        "train": {"max_steps": steps},
        "offload": {"nvme_path": str(folder / "nvme")},
        "logging": {"tensorboard": False, "report": False},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "zinf_cli.cli", "launch", str(folder / "recipe.yaml"), *row.keys]
    done = subprocess.run([*command, "--slots", str(row.slots), "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{row.name}: {done.stderr.strip()[-2000:]}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def _row(summary: dict[str, Any]) -> dict[str, Any]:
    """Each figure as it was predicted, and as it was measured."""
    predicted, measured = summary["predicted"], summary["measured"]
    names = {
        "step_s": "step_s",
        "memory_of_the_host_bytes": "host_cpu_bytes",
        "memory_of_a_rank_bytes": "cpu_bytes",
        "on_NVMe_bytes": "nvme_bytes",
        "NVMe_traffic_per_step_bytes": "nvme_traffic",
    }
    both = {name: (predicted[key], measured[key]) for name, key in names.items()}
    return {name: pair if all(pair) else None for name, pair in both.items()}


if __name__ == "__main__":
    main()
