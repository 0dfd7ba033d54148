"""`make test-crash`: long chains of crashes, in forked ranks and through the whole of `zinf launch`."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from crash_chain import TinyRun, assert_ends_unharmed, assert_survives, endless
from forked_ranks import ForkedRanks

KILLS = 25


@pytest.mark.parametrize("seed", [11, 12])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_long_chain(ranks: int, seed: int, forked: ForkedRanks, tmp_path: Path) -> None:
    assert_survives(forked, tmp_path, ranks, KILLS, seed)


def launch(run: TinyRun, ranks: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "zinf_cli.cli", "launch", str(run.recipe), "--slots", str(ranks)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_launcher_is_killed_with_all_it_started(ranks: int, tmp_path: Path) -> None:
    """Every process of the run dies with the launcher, wherever it is; the same command then goes on."""
    broken = endless(tmp_path / "broken")
    rng = random.Random(ranks)
    for _ in range(KILLS):
        process = launch(broken, ranks)
        log = broken.run_dir / "logs" / "start.json"
        before = log.stat().st_mtime_ns if log.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 1.2))
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"
        psutil.wait_procs([psutil.Process(pid) for pid in family if psutil.pid_exists(pid)], timeout=10)
        assert not [pid for pid in family if psutil.pid_exists(pid)]
    assert_ends_unharmed(broken, lambda run: launch(run, ranks).wait() == 0)
