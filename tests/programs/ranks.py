"""What two ranks do in each scenario of tests/integration/test_launch_runner.py, started by programs/launcher.py."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from zinf_cli.engine.ranks import Ranks
from zinf_cli.errors import CapacityError
from zinf_cli.train.rank_process import stop_requested


def meet(rank: int) -> float:
    if not dist.is_initialized():
        Ranks.join(torch.device("cpu"))
    total = torch.full((1,), float(rank + 1))
    dist.all_reduce(total)
    return total.item()


def connections_of(process: psutil.Process) -> list[Any]:
    try:
        return process.net_connections("inet")
    except psutil.NoSuchProcess:  # one that the supervisor had started to measure
        return []


def listeners() -> list[str]:
    """Addresses at which the launcher and what it has started listen."""
    _guard, _agent, _supervisor, launcher = psutil.Process().parents()[:4]
    tree = [launcher, *launcher.children(recursive=True)]
    found = [one for process in tree for one in connections_of(process)]
    return sorted({one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN})


def success(run_dir: Path, rank: int) -> None:
    subprocess.Popen(["sleep", "300"], start_new_session=True)  # an orphan in the end
    print("sum", meet(rank), "threads", torch.get_num_threads())
    if rank == 0:
        print("listeners", listeners())
    meet(rank)


def capacity(run_dir: Path, rank: int) -> None:
    if rank == 1:
        raise CapacityError("needs 9 GiB of 8", where="host:1", hint="less of it")
    time.sleep(300)


def peer_lost_first(run_dir: Path, rank: int) -> None:
    """The innocent rank's error comes before the guilty one's."""
    meet(rank)
    if rank == 0:
        meet(rank)
    dist.destroy_process_group()
    time.sleep(1)
    raise RuntimeError("the real reason")


def killed(run_dir: Path, rank: int) -> None:
    meet(rank)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    meet(rank)


def frozen(run_dir: Path, rank: int) -> None:
    ranks = Ranks.join(torch.device("cpu"), timeout_s=3)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    ranks.all(True)


def guard_killed(run_dir: Path, rank: int) -> None:
    if rank == 1:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(300)


def deaf(run_dir: Path, rank: int) -> int:
    if rank == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        still(run_dir, rank)
    while not (run_dir / "standing-0").exists():
        time.sleep(0.05)
    return 7


def stop(run_dir: Path, rank: int) -> None:
    (run_dir / f"standing-{rank}").touch()
    while not stop_requested():
        time.sleep(0.05)
    print("stopped in an orderly way")


def still(run_dir: Path, rank: int) -> None:
    (run_dir / f"standing-{rank}").touch()
    time.sleep(300)


def orphan(run_dir: Path, rank: int) -> None:
    subprocess.Popen(["setsid", "sleep", "300"])  # out of reach of every process group and tether
    still(run_dir, rank)


SCENARIOS = (success, capacity, peer_lost_first, killed, frozen, guard_killed, deaf, stop, still, orphan)


def life(run_dir: Path, scenario: str) -> int:
    """A rank's life; its exit code."""
    (play,) = [one for one in SCENARIOS if one.__name__ == scenario]
    return play(run_dir, int(os.environ["RANK"])) or 0
