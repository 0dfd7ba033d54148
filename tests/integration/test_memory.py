"""Memory follows the largest unit: a run in a control group that kills what crosses its limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

MIB = 2**20
LIMIT = 1200 * MIB


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A memory control group (v1) of LIMIT bytes."""
    folder = Path(f"/sys/fs/cgroup/memory/zinf-test-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(LIMIT))
    except OSError:
        pytest.skip("no memory control group (v1) can be made here")
    yield folder
    folder.rmdir()


def test_state_that_is_twice_the_memory_trains_within_it(tmp_path: Path, control_group: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(4000) * 7 % 8000)
    model = {
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": 11, "num_attention_heads": 16, "tie_word_embeddings": False,
    }  # fmt: skip
    recipe = {
        "model": {"config": model},
        "dataset": {"path": str(tmp_path / "tokens.npy")},
        "train": {"seq_len": 16, "global_batch_size": 2, "max_steps": 2},
        "offload": {
            **dict.fromkeys(("params", "grads", "optimizer", "activations"), "nvme"),
            "nvme_path": str(tmp_path / "nvme"),
            "cpu_memory": "1150MiB",
        },
        "logging": {"tensorboard": False, "report": False},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    join = f"echo $$ > {control_group}/cgroup.procs && exec {sys.executable} -m zinf_cli.cli launch "
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        ["sh", "-c", join + str(tmp_path / "recipe.yaml")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["predicted"]["nvme_bytes"] > 2 * LIMIT
    assert summary["measured"]["host_cpu_bytes"] <= summary["predicted"]["host_cpu_bytes"] <= 1150 * MIB
    assert int((control_group / "memory.max_usage_in_bytes").read_text()) <= LIMIT
