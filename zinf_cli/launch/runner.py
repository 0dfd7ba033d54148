"""Run ranks on this machine under torchrun: spawn, watch, stop, and report how it ended.

torchrun's agent is a subprocess (the launcher never imports torch) that starts the ranks and, when one
fails, sends SIGTERM to the others. What it leaves open is done here: the user's Ctrl-C, ranks that ignore
SIGTERM, the name of the first failure, and the guarantee that nothing is left running.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from zinf_cli.errors import Interrupted
from zinf_cli.launch.failure import AGENT_LOG, Failure, any_recorded, first_failure, forget_errors
from zinf_cli.launch.process import ProcessTree

STOP_FILE = "stop"
"""In the run's folder: asks the ranks to stop at the end of their step."""

_POLL_S = 0.2

_TEARDOWN_S = 4.0
"""From the first recorded error until what still runs is killed; torchrun alone would wait for 30 s."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code 0, the failure's, or 130 after Ctrl-C."""

    exit_code: int
    failure: Failure | None
    interrupted: bool


def run_ranks(
    module: str,
    arguments: Sequence[str],
    *,
    ranks: int,
    run_dir: Path,
    threads_per_rank: int,
    on_poll: Callable[[], None],
    notify: Callable[[str], None],
) -> Outcome:
    """Run `python -m module *arguments` as `ranks` ranks until they end, one fails, or the user stops them.

    `module` is expected to go through train.rank_process.run_rank. `on_poll` is called about every 0.2 s
    and once after the end; `notify` gets a line for the user when Ctrl-C is first pressed. SIGINT or
    SIGTERM once asks the ranks to stop after their step, twice kills them. To be called from the main
    thread, which is what may set signal handlers; they, and the sub-reaper flag, are put back at the end.
    Writes run_dir/logs.
    """
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    stop_file = run_dir / STOP_FILE
    stop_file.unlink(missing_ok=True)
    forget_errors(run_dir)
    try:
        with _StopSignals() as stop_signals, ProcessTree() as tree:
            agent = tree.start(
                _agent_command(module, arguments, ranks),
                environment=_agent_environment(threads_per_rank),
                log=run_dir / "logs" / AGENT_LOG,
            )
            return _watch(agent, tree, stop_signals, run_dir, on_poll, notify)
    finally:
        stop_file.unlink(missing_ok=True)


def _watch(
    agent: subprocess.Popen[bytes],
    tree: ProcessTree,
    stop_signals: _StopSignals,
    run_dir: Path,
    on_poll: Callable[[], None],
    notify: Callable[[str], None],
) -> Outcome:
    asked_to_stop = False
    teardown_due: float | None = None
    while not _ended(agent, within=_POLL_S):
        on_poll()
        if stop_signals.received >= 2:
            tree.kill()
            return Outcome(Interrupted.exit_code, None, interrupted=True)
        if stop_signals.received and not asked_to_stop:
            asked_to_stop = True
            (run_dir / STOP_FILE).touch()
            notify("stopping after this step; press Ctrl-C again to kill the ranks now")
        if teardown_due is None and any_recorded(run_dir):
            teardown_due = time.monotonic() + _TEARDOWN_S
        if teardown_due is not None and time.monotonic() > teardown_due:
            break
    failure = first_failure(run_dir, agent.returncode)  # before the kill, which a guard might record as well
    tree.kill()
    on_poll()
    if failure is not None:
        return Outcome(failure.exit_code, failure, interrupted=asked_to_stop)
    return Outcome(Interrupted.exit_code if asked_to_stop else 0, None, interrupted=asked_to_stop)


def _ended(agent: subprocess.Popen[bytes], *, within: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        agent.wait(within)
    return agent.returncode is not None


def _agent_command(module: str, arguments: Sequence[str], ranks: int) -> list[str]:
    """Port 0 lets the kernel pick a free one, which the ranks then share, so two runs never want the same.

    The addresses are loopback because a host's own name need not resolve. Without --log-dir torchrun would
    leave a folder in /tmp.
    """
    options = {
        "--nnodes": "1",
        "--nproc-per-node": str(ranks),
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "127.0.0.1:0",
        "--rdzv-id": uuid.uuid4().hex,
        "--local-addr": "127.0.0.1",
        "--max-restarts": "0",
        "--log-dir": os.devnull,
    }
    flat = [word for option in options.items() for word in option]
    return [sys.executable, "-m", "torch.distributed.run", *flat, "-m", module, *arguments]


_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
"""glibc's heap of a rank: one for all threads, of which one computes at a time, and fixed thresholds. Left to itself it
keeps what each micro-batch's thread freed (the demo: 1.21 instead of 1.41 GiB) and maps large temporaries anew each
time."""


def _agent_environment(threads_per_rank: int) -> dict[str, str]:
    return {**_MALLOC, **os.environ, "OMP_NUM_THREADS": str(threads_per_rank), "PYTHONUNBUFFERED": "1"}


class _StopSignals:
    """Counts SIGINT and SIGTERM while it is open, in place of what they did before."""

    def __enter__(self) -> _StopSignals:
        self.received = 0
        self._previous: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._count) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.received += 1
