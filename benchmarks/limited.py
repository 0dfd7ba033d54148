"""A command with a limit of time, and how much of the machine's memory it takes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zinf_cli.machine.hardware import available_memory

LOOK_S = 0.2
PATIENCE_S = 15.0
"""Between one signal to end and the next."""


@dataclass(frozen=True)
class Ended:
    """How a command has ended."""

    code: int | None
    """Its exit status. None: its time was up."""
    steps: list[dict[str, Any]]
    """The lines about steps that it has written."""
    said: str
    """What it has printed."""
    host_bytes: int
    """By how much the CPU memory that a new process could use was less at the least, page-locked memory included."""


def run_limited(command: Sequence[str], environment: Mapping[str, str], steps_file: Path, limit_s: float) -> Ended:
    """Run `command`, which appends a JSON object a step to `steps_file`; interrupt it after `limit_s` seconds."""
    before = least = available_memory()
    end = time.monotonic() + limit_s
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() < end:
                least = min(least, available_memory())
                time.sleep(LOOK_S)
            code = process.poll()
        finally:
            _end(process)
        output.seek(0)
        said = output.read()
    lines = steps_file.read_text().splitlines() if steps_file.exists() else []
    steps = [line for line in map(json.loads, lines) if "step_s" in line]
    return Ended(code, steps, said, before - least)


def _end(process: subprocess.Popen[bytes]) -> None:
    """zinf ends after its step when it is interrupted once, and at once when it is interrupted twice."""
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
