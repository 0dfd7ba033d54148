"""`python -m benchmarks.startup` (root): from Enter to the first step on 4 hosts, beside plain torchrun.

The hosts are sshd processes in network namespaces of this machine (tests/lab.py). Plain torchrun is four agents started
there at once, whose ranks import what zinf's import and do one all-reduce. zinf's second launch of a recipe finds what
it had looked up for the first one. In turn; medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from benchmarks.results import add_save, report
from tests.lab import Lab, namespace_lab

HOSTS, ROUNDS = 4, 3
SCRIPT = """
import time
import torch
import torch.distributed as dist
import zinf_cli.train.loop
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 0:
    print("met", time.time(), flush=True)
dist.destroy_process_group()
"""
LLAMA = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="From Enter to the first step on 4 hosts, beside plain torchrun.")
    add_save(parser)
    arguments = parser.parse_args()
    plain, first, second = [], [], []
    with tempfile.TemporaryDirectory(prefix="zinf-") as name, namespace_lab(Path(name), HOSTS) as lab:
        folder = Path(name)
        (folder / "script.py").write_text(SCRIPT)
        for attempt in range(ROUNDS):
            plain.append(_torchrun(lab, folder / "script.py", 29500 + attempt))
            recipe = _recipe(folder / str(attempt))
            first.append(_zinf(lab, recipe))
            shutil.rmtree(recipe.parent / "run")
            second.append(_zinf(lab, recipe))
    measured = {"first_launch_s": first, "again_s": second, "torchrun_s": plain}
    row = {name: statistics.median(seconds) for name, seconds in measured.items()}
    report(f"{HOSTS} hosts", [row], arguments.save, measured=measured)


def _torchrun(lab: Lab, script: Path, port: int) -> float:
    start = time.time()
    agents = []
    for rank, host in enumerate(lab.hosts):
        command = ["ip", "netns", "exec", str(host.namespace), "env", "OMP_NUM_THREADS=1", "GLOO_SOCKET_IFNAME=eth0"]
        command += [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(HOSTS), "--node-rank", str(rank)]
        command += ["--master-addr", "10.77.0.1", "--master-port", str(port), "--log-dir", os.devnull, str(script)]
        agents.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
    said = "".join(agent.communicate()[0] for agent in agents)
    return float(said.split("met ")[1].split()[0]) - start


def _recipe(folder: Path) -> Path:
    folder.mkdir()
    np.save(folder / "tokens.npy", np.arange(4000) % 251)
    recipe = {
        "model": {"config": LLAMA},
        "dataset": {"path": str(folder / "tokens.npy")},
        "train": {"seq_len": 16, "micro_batch_size": 1, "global_batch_size": HOSTS, "max_steps": 2},
        "offload": {"nvme_path": str(folder / "nvme")},
        "logging": {"tensorboard": False, "report": False},
        "output_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _zinf(lab: Lab, recipe: Path) -> float:
    metrics = recipe.parent / "run" / "metrics.jsonl"
    start = time.time()
    command = lab.zinf("launch", str(recipe), "--hosts", lab.hostfile())
    process = subprocess.Popen(
        command, env=lab.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll() is not None:
            raise SystemExit(f"zinf ended with {process.returncode}: {process.communicate()[1][-2000:]}")
        time.sleep(0.02)
    seconds = time.time() - start
    process.communicate()
    return seconds


if __name__ == "__main__":
    main()
