"""The contenders: each trains a case in processes of its own and is watched from outside."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import yaml

from benchmarks.case import NEVER_CLIPS, Case
from benchmarks.watch import Watched, watch
from zinf_cli.run_folder.names import METRICS, PLAN

WARM_UP = 2
"""First steps that do not count: memory is touched, the route is learned."""

CLASSES = ("params", "grads", "optimizer", "activations")
PEER_PYTHON = Path(".venv-peer/bin/python")

Contender = Callable[[Case, int, Path], Watched]


def launch_command(case: Case, tier: str | Mapping[str, str], steps: int, folder: Path) -> tuple[list[str], Path]:
    """A command that trains `case` on one rank, and its run's folder.

    All four classes of state lie on `tier`. Or it has keys of the recipe's section offload: a tier for each class, or a
    budget.
    """
    name, tiers = ("zinf-mixed", tier) if isinstance(tier, Mapping) else (f"zinf-{tier}", dict.fromkeys(CLASSES, tier))
    run_dir = folder / name
    tokens = folder / "tokens.npy"
    if not tokens.exists():
        np.save(tokens, np.random.default_rng(0).integers(0, case.config["vocab_size"], 500_000, dtype=np.int32))
    recipe = {
        "model": {"config": case.config},
        "dataset": {"path": str(tokens)},
        "train": {
            "seq_len": case.tokens,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": case.micro_batches,
            "max_steps": steps,
            "max_grad_norm": case.clip,
            "precision": case.precision,
        },
        "optimizer": {"lr": 1e-4, "state_dtype": case.state_dtype},
        "activation_checkpointing": "unit" if case.checkpointing else "none",
        "offload": {
            **tiers,
            "nvme_path": str(folder / "nvme"),
        },
        "logging": {"tensorboard": False, "report": False},
        "output_dir": str(run_dir),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return [sys.executable, "-m", "zinf_cli.cli", "launch", str(path), "--slots", "1"], run_dir


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}


def zinf(tier: str | Mapping[str, str]) -> Contender:
    """zinf with its state on `tier`: see launch_command."""

    def run(case: Case, steps: int, folder: Path) -> Watched:
        command, run_dir = launch_command(case, tier, steps + WARM_UP, folder)
        watched = watch(command, environment(folder), run_dir / METRICS, WARM_UP)
        plan = json.loads((run_dir / PLAN).read_text())
        planned = plan["nvme_traffic" if case.clip in (None, NEVER_CLIPS) else "nvme_traffic_clipped"]
        return dataclasses.replace(watched, planned_bytes=planned)

    return run


def plain(case: Case, steps: int, folder: Path) -> Watched:
    """Plain PyTorch in memory."""
    steps_file = folder / "plain.jsonl"
    command = [sys.executable, "-m", "benchmarks.plain", str(steps_file), json.dumps(dataclasses.asdict(case))]
    return watch([*command, str(steps + WARM_UP)], os.environ, steps_file, WARM_UP)


def deepspeed(small: bool) -> Contender:
    """DeepSpeed in a virtual environment of its own; `small` as in deepspeed_peer.config."""

    def run(case: Case, steps: int, folder: Path) -> Watched:
        if not PEER_PYTHON.exists():
            raise SystemExit("error: DeepSpeed is not installed: make bench-peer")
        steps_file, state = folder / "deepspeed.jsonl", folder / "deepspeed"
        command = [str(PEER_PYTHON), "-m", "benchmarks.deepspeed_peer", str(steps_file)]
        command += [json.dumps(dataclasses.asdict(case)), str(steps + WARM_UP), str(state), json.dumps(small)]
        try:
            return watch(command, os.environ, steps_file, WARM_UP)
        finally:
            shutil.rmtree(state, ignore_errors=True)  # its files stay when it ends

    return run


CONTENDERS: dict[str, Contender] = {
    "plain": plain,
    "zinf-cpu": zinf("cpu"),
    "zinf-nvme": zinf("nvme"),
    "zinf-in-1.2-gb": zinf({"cpu_memory": "1.2GB"}),
    "zinf-in-2-gib": zinf({"cpu_memory": "2GiB"}),
    "zinf-in-3.2-gib": zinf({"cpu_memory": "3.2GiB"}),
    "deepspeed": deepspeed(small=False),
    "deepspeed-small": deepspeed(small=True),
}
