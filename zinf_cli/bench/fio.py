"""fio beside zinf's own figures, where fio is installed: the same nameless files, in turn.

fio reaches the files through /proc/PID/fd, so it leaves nothing on the drive either. It is given huge pages, as zinf
has them, by way of its C library: with these it is up to twice as fast, and steady.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from zinf_cli.bench.nvme import READ, WRITE, Bench, Files, Point, Result, open_files

BLOCK_SIZES = (4 * 2**20, 8 * 2**20)
DEPTH = 16
PAIRS = 4
"""Runs of fio with each block size, each beside one of zinf's best; they take turns in who goes first."""
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""glibc asks for huge pages under what it hands out; another C library knows nothing of it."""
ENGINES = ("io_uring", "libaio", "psync")
"""In the order of preference; a kernel may refuse the first."""


def beside_fio(result: Result) -> dict[str, object] | None:
    """fio's best of each direction, and zinf's share of it in the same minutes ("zinf_of_fio"); None without fio."""
    if shutil.which("fio") is None:
        return None
    with open_files(result.folders, result.size) as files:
        bench = Bench(files, lambda doing, moved: None)
        bench.run(WRITE, result.size, result.write.block_size, result.write.threads, "filling")
        engine = next((name for name in ENGINES if _fio(files, READ, BLOCK_SIZES[0], name)), None)
        if engine is None:
            return None
        found: dict[str, object] = {"engine": engine, "depth": DEPTH}
        shares: dict[str, float] = {}
        for best in (result.read, result.write):

            def mine(best: Point = best) -> float:
                return bench.run(best.direction, result.size, best.block_size, best.threads, "").bytes_per_s

            pairs = {
                block: _in_turn(partial(_fio, files, best.direction, block, engine), mine) for block in BLOCK_SIZES
            }
            block, (theirs, ours) = max(pairs.items(), key=lambda pair: pair[1][0])
            if not theirs:
                return None
            found[best.direction] = {"bytes_per_s": theirs, "block_size": block, "depth": DEPTH}
            shares[best.direction] = ours / theirs
        return {**found, "zinf_of_fio": shares}


def _in_turn(*contenders: Callable[[], float]) -> tuple[float, ...]:
    """The median of each contender's measurements; they take turns in who goes first."""
    found: list[list[float]] = [[] for _ in contenders]
    for number in range(PAIRS):
        for index in sorted(range(len(contenders)), reverse=number % 2 == 1):
            found[index].append(contenders[index]())
    return tuple(map(statistics.median, found))


def _fio(files: Files, direction: str, block_size: int, engine: str) -> float:
    """Bytes per second of one pass over the files; 0 where fio can't."""
    part = files.part // block_size * block_size
    if part == 0:
        return 0.0
    command = ["fio", "--name=zinf", f"--filename={_names(files.descriptors)}", f"--rw={direction}", "--direct=1"]
    command += [f"--bs={block_size}", f"--iodepth={DEPTH}", f"--ioengine={engine}", "--output-format=json"]
    command += [f"--size={part * len(files.descriptors)}", "--thread", "--allow_file_create=0", "--invalidate=0"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path("/"), env=os.environ | HUGE_PAGES
    )
    if done.returncode != 0:
        return 0.0
    try:
        return float(json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][direction]["bw_bytes"])
    except (ValueError, KeyError, IndexError):
        return 0.0


def _names(descriptors: Sequence[int]) -> str:
    return ":".join(f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in descriptors)
