"""A command and its process tree, watched from outside: peak memory, bytes to and from drives."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL_S = 0.2


@dataclass(frozen=True)
class Watched:
    """What a contender's run took. Times are of its steps, in seconds; bytes are of the kernel's counters."""

    step_s: list[float]
    wait_s: list[float]
    """Seconds of each step in which compute waited, where the contender knows."""
    loss: list[float]
    """Of every step, the skipped ones too."""
    read_bytes: int
    """Of one step, on average."""
    write_bytes: int
    peak_bytes: int
    """Proportional set size of the whole tree."""


def watch(command: Sequence[str], environment: Mapping[str, str], steps_file: Path, skip: int) -> Watched:
    """Run `command`, which appends {step_s, loss, wait_s?} a step to `steps_file`; the first `skip` don't count."""
    steps_file.unlink(missing_ok=True)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    reader.start()
    peak, moved = 0, (0, 0)
    before: tuple[int, int] | None = None
    count_before = 0
    after: tuple[int, int] = (0, 0)
    count_after = 0
    while process.poll() is None:
        memory, moved = _look(process.pid)
        peak = max(peak, memory)
        count = _lines(steps_file)
        if count >= skip and before is None:
            before, count_before = moved, count
        if count > count_after:
            after, count_after = moved, count
        time.sleep(INTERVAL_S)
    reader.join(5)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(said)[-3000:]}")
    steps = [json.loads(line) for line in steps_file.read_text().splitlines()]
    every_step = [step for step in steps if "step_s" in step]
    steps = every_step[skip:]
    counted = max(1, count_after - count_before)
    first = before or (0, 0)
    return Watched(
        [step["step_s"] for step in steps],
        [step["wait_s"] for step in steps if "wait_s" in step],
        [step["loss"] for step in every_step],
        (after[0] - first[0]) // counted,
        (after[1] - first[1]) // counted,
        peak,
    )


def _lines(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.read_bytes().count(b"\n")
    return 0


def _look(pid: int) -> tuple[int, tuple[int, int]]:
    """(PSS, (bytes read, bytes written)) of a process and all below it."""
    memory = read = written = 0
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error, OSError):
                memory += process.memory_full_info().pss
                counters = process.io_counters()
                read += counters.read_bytes
                written += counters.write_bytes
    return memory, (read, written)
