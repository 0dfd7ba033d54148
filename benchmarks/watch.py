"""A command and its process tree, watched from outside: peak memory, bytes to and from drives, and their CPU time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    drive_cpu_s: float
    """User and system time of one step, of the threads that move its bytes."""
    planned_bytes: int | None = None
    """What the plan says that a step reads and writes, where the contender has one."""


@dataclass(frozen=True)
class _Look:
    """At one moment, of a process and all below it."""

    memory: int = 0
    """PSS."""
    read: int = 0
    written: int = 0
    threads: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    """Bytes moved and CPU seconds of each thread."""


def watch(command: Sequence[str], environment: Mapping[str, str], steps_file: Path, skip: int) -> Watched:
    """Run `command`, which appends {step_s, loss, wait_s?} a step to `steps_file`; the first `skip` don't count."""
    steps_file.unlink(missing_ok=True)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    reader.start()
    peak = 0
    before: _Look | None = None
    threads: dict[int, tuple[int, float]] = {}
    count_before = 0
    after = _Look()
    count_after = 0
    while process.poll() is None:
        now = _look(process.pid)
        threads |= now.threads  # at the end of a run its drives' threads are gone before its last line is seen
        peak = max(peak, now.memory)
        count = _lines(steps_file)
        if count >= skip and before is None:
            before, count_before = now, count
        if count > count_after and now.read + now.written >= after.read + after.written:  # else a rank is gone
            after, count_after = replace(now, threads=dict(threads)), count
        time.sleep(INTERVAL_S)
    reader.join(5)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(said)[-3000:]}")
    steps = [json.loads(line) for line in steps_file.read_text().splitlines()]
    every_step = [step for step in steps if "step_s" in step]
    steps = every_step[skip:]
    counted = max(1, count_after - count_before)
    first = before or _Look()
    return Watched(
        [step["step_s"] for step in steps],
        [step["wait_s"] for step in steps if "wait_s" in step],
        [step["loss"] for step in every_step],
        (after.read - first.read) // counted,
        (after.written - first.written) // counted,
        peak,
        _drive_cpu_s(first, after) / counted,
    )


def _drive_cpu_s(before: _Look, after: _Look) -> float:
    """Of the threads that have moved a quarter as much as the busiest, or more. The others move a little as well: a
    line a step, and pages that the kernel had put aside."""
    spent = {}
    for thread, (moved, cpu) in after.threads.items():
        moved_before, cpu_before = before.threads.get(thread, (0, 0.0))
        spent[thread] = moved - moved_before, cpu - cpu_before
    most = max((moved for moved, _ in spent.values()), default=0)
    return sum(cpu for moved, cpu in spent.values() if moved > most / 4)


def _lines(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.read_bytes().count(b"\n")
    return 0


def _look(pid: int) -> _Look:
    memory = read = written = 0
    threads: dict[int, tuple[int, float]] = {}
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error, OSError):
                memory += process.memory_full_info().pss
                counters = process.io_counters()
                read += counters.read_bytes
                written += counters.write_bytes
                for of in process.threads():
                    with contextlib.suppress(OSError):  # it may just have ended
                        threads[of.id] = _moved(process.pid, of.id), of.user_time + of.system_time
    return _Look(memory, read, written, threads)


def _moved(pid: int, thread: int) -> int:
    """Bytes that a thread has read from drives and written to them."""
    counters = dict(line.split(": ") for line in Path(f"/proc/{pid}/task/{thread}/io").read_text().splitlines())
    return int(counters["read_bytes"]) + int(counters["write_bytes"])
