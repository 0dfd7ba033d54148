"""fio beside zinf's own figures, where fio is installed: the same nameless files, in turn.

fio reaches the files through /proc/PID/fd, so it leaves nothing on the drive either.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from zinf_cli.bench.nvme import READ, WRITE, Bench, Files, Result, open_files

BLOCK_SIZES = (4 * 2**20, 8 * 2**20)
DEPTH = 16
PAIRS = 6
"""Runs of fio with each block size, each beside one of zinf's best; they take turns in who goes first."""
ENGINES = ("io_uring", "libaio", "psync")
"""In the order of preference; a kernel may refuse the first."""


def beside_fio(result: Result) -> dict[str, object] | None:
    """fio's best of each direction, and zinf's share of it in the same minutes ("zinf_of_fio"); None without fio."""
    if shutil.which("fio") is None:
        return None
    with open_files(result.folders, result.size) as files:
        bench = Bench(files, lambda doing, moved: None)
        bench.run(WRITE, result.size, result.write.block_size, result.write.threads, "filling")
        engine = next((name for name in ENGINES if _fio(files, result, READ, BLOCK_SIZES[0], name) is not None), None)
        if engine is None:
            return None
        found: dict[str, object] = {"engine": engine, "depth": DEPTH}
        shares: dict[str, float] = {}
        for direction, best in ((READ, result.read), (WRITE, result.write)):
            theirs: dict[int, list[float]] = {block: [] for block in BLOCK_SIZES}
            mine: dict[int, list[float]] = {block: [] for block in BLOCK_SIZES}
            for number in range(PAIRS):
                for block in BLOCK_SIZES:
                    for fio in (True, False) if number % 2 else (False, True):
                        if fio:
                            theirs[block].append(_fio(files, result, direction, block, engine) or 0.0)
                        else:
                            done = bench.run(direction, result.size, best.block_size, best.threads, direction)
                            mine[block].append(done.bytes_per_s)
            medians = {block: statistics.median(rates) for block, rates in theirs.items()}
            block = max(medians, key=lambda size: medians[size])
            found[direction] = {"bytes_per_s": medians[block], "block_size": block, "depth": DEPTH}
            shares[direction] = statistics.median(mine[block]) / medians[block]
        return {**found, "zinf_of_fio": shares}


def _fio(files: Files, result: Result, direction: str, block_size: int, engine: str) -> float | None:
    """Bytes per second of one pass over the files; None where fio can't."""
    part = files.part // block_size * block_size
    if part == 0:
        return None
    command = ["fio", "--name=zinf", f"--filename={_names(files.descriptors)}", f"--rw={direction}", "--direct=1"]
    command += [f"--bs={block_size}", f"--iodepth={DEPTH}", f"--ioengine={engine}", "--output-format=json"]
    command += [f"--size={part * len(files.descriptors)}", "--thread", "--allow_file_create=0", "--invalidate=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path("/"))
    if done.returncode != 0:
        return None
    try:
        rate = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][direction]["bw_bytes"]
    except (ValueError, KeyError, IndexError):
        return None
    return float(rate) or None


def _names(descriptors: Sequence[int]) -> str:
    return ":".join(f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in descriptors)
