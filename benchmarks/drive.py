"""How fast a drive is now, and what a user's `zinf bench` says of it and of the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from zinf_cli.bench.nvme import READ, WRITE, Bench, Point, open_files

DRIVE_BYTES = 2**30


def drive_rate(folder: Path) -> float:
    """Bytes per second of a drive, reading and writing at once, with the threads and blocks that a run has."""
    with open_files([folder], DRIVE_BYTES) as files:
        bench = Bench(files, lambda doing, num_bytes: None)
        points = [Point(direction, 4 * 2**20, 2, 0.0) for direction in (WRITE, READ)]
        bench.run(WRITE, DRIVE_BYTES, points[0].block_size, points[0].threads, "filling")
        return bench.both(points[1], points[0], DRIVE_BYTES)


def bench_hardware(folder: Path) -> None:
    """Write a hardware.yaml into `folder`, which plans of recipes beside it go by."""
    out = ("--out", str(folder / "hardware.yaml"))
    nvme = ("nvme", str(folder), "--size", "1GiB", "--block-sizes", "4MiB", "--threads", "2")
    for what in (("links",), nvme):
        command = [sys.executable, "-m", "zinf_cli.cli", "bench", *what, *out]
        subprocess.run(command, capture_output=True, check=True)
