"""How a rank comes from torchrun's agent."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from own_processes import in_processes
from zinf_cli.train.agent import _rank

TASKS = Path("/proc/self/task")


def threads_of_guard(run_dir: Path) -> tuple[int, int, str]:
    """How many threads the kernel knows of this process before and after it was a rank's guard; those of the rank."""
    os.environ |= {"RANK": "0", "OMP_NUM_THREADS": "3", "ZINF_AGENT_PID": str(os.getppid())}
    before = len(list(TASKS.iterdir()))
    _rank(partial(_write_threads, run_dir), run_dir)
    return before, len(list(TASKS.iterdir())), (run_dir / "threads").read_text()


def _write_threads(run_dir: Path) -> int:
    import torch

    (run_dir / "threads").write_text(str(torch.get_num_threads()))
    return 0


def test_a_guard_starts_no_thread_before_it_forks_the_rank(tmp_path: Path) -> None:
    """A fork of a process with threads may stand still, and Python 3.12 warns of it."""
    (tmp_path / "logs").mkdir()
    ((before, after, of_rank),) = in_processes(threads_of_guard, [(tmp_path,)])
    assert after == before
    assert of_rank == "3"
