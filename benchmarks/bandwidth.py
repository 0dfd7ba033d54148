"""`python -m benchmarks.bandwidth`: fetching a parameter from the drives of N hosts, sliced over them or kept by one.

The central claim of ZeRO-Infinity (section 6.1): where every drive has the same limited bandwidth, fetching a unit
that is sliced over all of them takes 1/N of the time; where one owner keeps the whole of it, N does not matter. A rank
stands for a host; a control group (root, cgroup v1) limits how fast each may read. There is no read-ahead here.
"""

from __future__ import annotations

import argparse
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.results import add_save, report
from zinf_cli.amounts import format_bytes, parse_bytes
from zinf_cli.engine.ranks import Ranks
from zinf_cli.tiers.nvme import NvmeTier
from zinf_cli.trace import Trace

LAYOUTS = ("sliced", "owner")
GROUPS = Path("/sys/fs/cgroup/blkio")


def seconds_per_fetch(layout: str, ranks: Ranks, folder: Path, unit_bytes: int, fetches: int) -> float:
    """To have a unit in every rank's memory, measured on this rank."""
    rank, world_size = ranks.rank, ranks.world_size
    buffer = torch.frombuffer(mmap.mmap(-1, unit_bytes), dtype=torch.uint8)
    own = buffer if layout == "owner" else buffer[unit_bytes // world_size * rank :][: unit_bytes // world_size]
    trace = Trace(rank)
    drive = NvmeTier([folder], trace, rank=rank)
    extent = drive.allocate(own.numel(), "unit")
    extent.write(0, own).wait()  # space that was only reserved would be read without touching the drive
    dist.barrier()
    start = time.perf_counter()
    for number in range(fetches):
        owner = number % world_size
        if layout == "sliced" or rank == owner:
            extent.read(0, own).wait()
        if layout == "sliced":
            ranks.gather(buffer, own, trace, "unit").wait()
        else:
            dist.broadcast(buffer, owner)
    seconds = (time.perf_counter() - start) / fetches
    drive.close()
    return seconds


@contextmanager
def limited(name: str, folder: Path, bytes_per_s: int) -> Iterator[Path]:
    """A control group whose processes read no faster than that from the drive below `folder`."""
    device = folder.stat().st_dev
    group = GROUPS / name
    group.mkdir()
    try:
        limit = f"{os.major(device)}:{os.minor(device)} {bytes_per_s}"
        (group / "blkio.throttle.read_bps_device").write_text(limit)
        yield group
    finally:
        group.rmdir()


def measure(layout: str, num_hosts: int, folder: Path, asked: argparse.Namespace) -> float:
    """Seconds per fetch on `num_hosts` hosts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ExitStack() as open_groups:
        processes = []
        for rank in range(num_hosts):
            group = open_groups.enter_context(limited(f"zinf-{os.getpid()}-{rank}", folder, asked.bandwidth))
            environment = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(num_hosts), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.bandwidth", "--rank", layout, "--folder", str(folder)]
            command += ["--unit", str(asked.unit), "--fetches", str(asked.fetches), "--group", str(group)]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        return max(float(process.communicate()[0]) for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetches from limited drives, by the number of hosts.")
    parser.add_argument("--hosts", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--bandwidth", type=parse_bytes, default=10_000_000, help="of each host's drive, bytes/s")
    parser.add_argument("--unit", type=parse_bytes, default=64 << 20, help="bytes of the unit")
    parser.add_argument("--fetches", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="on the drive")
    parser.add_argument("--rank", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    add_save(parser)
    asked = parser.parse_args()
    if asked.rank is not None:
        (asked.group / "cgroup.procs").write_text(str(os.getpid()))
        ranks = Ranks.join(torch.device("cpu"))
        print(seconds_per_fetch(asked.rank, ranks, asked.folder, asked.unit, asked.fetches))
        ranks.leave()
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=asked.folder or Path.cwd(), prefix="zinf-bandwidth-") as name:
        alone = None
        for num_hosts in asked.hosts:
            sliced, owner = (measure(layout, num_hosts, Path(name), asked) for layout in LAYOUTS)
            alone = alone or sliced * num_hosts
            share = alone / (sliced * num_hosts)
            rows.append({"hosts": num_hosts, "sliced_s": sliced, "efficiency_share": share, "kept_by_one_s": owner})
    report(f"a unit of {format_bytes(asked.unit)}", rows, asked.save)


if __name__ == "__main__":
    main()
