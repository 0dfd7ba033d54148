"""`python -m benchmarks.layers`: layers of 16M to 1.07B parameters in one fixed amount of memory (root, cgroup v1).

Llamas of two layers, hidden size 1024 to 8192, intermediate four times that, fp32, all four classes of state on NVMe.
Each trains three steps under the same `offload.cpu_memory`, in a control group that kills what crosses it. The largest
takes 35 GB of the drive.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.contenders import environment
from benchmarks.results import add_save, report
from benchmarks.rows import Row

GROUPS = Path("/sys/fs/cgroup/memory")
LIMIT = 2**30
VOCABULARY = 512
INTERVAL_S = 0.2


def recipe_of(hidden: int, folder: Path) -> dict[str, Any]:
    """The recipe of a llama whose layers have 16 × hidden² parameters."""
    config = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    tiers = dict.fromkeys(("params", "grads", "optimizer", "activations"), "nvme")
    return {
        "model": {"config": config},
        "dataset": {"path": str(folder / "tokens.npy")},
        "train": {"seq_len": 16, "gradient_accumulation_steps": 2, "max_steps": 3, "precision": "fp32"},
        "offload": {**tiers, "nvme_path": str(folder / "nvme"), "nvme_space": "40GiB", "cpu_memory": LIMIT},
        "logging": {"tensorboard": False, "report": False},
        "output_dir": str(folder / "run"),
    }


@dataclass
class Group:
    """A control group, and the most memory that its processes have had at once."""

    folder: Path
    peak: int = 0

    def look(self) -> None:
        """Memory is what the group is charged for, without files, and the pages of libraries that a process maps: these
        are charged to the group that has read them first."""
        with suppress(OSError):
            charged = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
            pids = (self.folder / "cgroup.procs").read_text().split()
            self.peak = max(self.peak, int(charged["rss"]) + max(map(_mapped, pids), default=0))


def _mapped(pid: str) -> int:
    with suppress(OSError):
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return next((int(words[1]) * 1024 for words in lines if words[0] == "RssFile:"), 0)
    return 0


@contextmanager
def control_group(limit: int) -> Iterator[Group]:
    """A control group that kills what crosses `limit` bytes, watched."""
    group = Group(Path(tempfile.mkdtemp(prefix="zinf-", dir=GROUPS)))
    (group.folder / "memory.limit_in_bytes").write_text(str(limit))
    over = threading.Event()

    def watch() -> None:
        while not over.wait(INTERVAL_S):
            group.look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield group
    finally:
        over.set()
        watcher.join()
        group.folder.rmdir()


def train(hidden: int, folder: Path) -> dict[str, Any]:
    """The summary of a run in a control group, with its peak, the number of its units, and elements of the largest."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(hidden, folder)))
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, VOCABULARY, 4096, dtype=np.int32))
    with control_group(LIMIT) as group:
        inside = f'echo $$ > {group.folder}/cgroup.procs; exec "$@"'
        command = ["sh", "-c", inside, "sh", sys.executable, "-m", "zinf_cli.cli", "launch", str(recipe), "--json"]
        done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"hidden {hidden}: ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    plan = json.loads((folder / "run" / "plan.json").read_text())
    units = [unit["trainable_numel"] for unit in plan["figures"]["model"]["units"]]
    return {**json.loads(done.stdout), "peak": group.peak, "units": len(units), "largest": max(units)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Layers of every size in one fixed amount of memory.")
    parser.add_argument("--hidden", nargs="*", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the drive is")
    add_save(parser)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for hidden in arguments.hidden:
        folder = Path(tempfile.mkdtemp(prefix="layers-", dir=arguments.folder)).absolute()
        try:
            found = train(hidden, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        planned, measured = found["predicted"], found["measured"]
        row: Row = {
            "a layer": f"{16 * hidden**2 / 1e6:.0f}M",
            "units": found["units"],
            "largest": f"{found['largest'] / 1e6:.1f}M",
            "memory_of_all_processes_bytes": [planned["host_cpu_bytes"], found["peak"]],
            "memory_of_the_rank_bytes": [planned["cpu_bytes"], measured["cpu_bytes"]],
            "step_s": measured["step_s"],
        }
        report(f"hidden {hidden}", [row], arguments.save)


if __name__ == "__main__":
    main()
