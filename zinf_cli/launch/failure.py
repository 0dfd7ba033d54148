"""Which rank failed first, and why.

When one rank dies the others fail a moment later in a collective, and torchrun terminates whoever is left.
Only the first failure helps the user, and exit codes can't tell it. So each rank records its own error in
`logs/error-00003.json` (written by train/rank_process.py), with the time and whether it is *secondary*, that
is caused by the loss of a peer; a rank killed by a signal is recorded by its guard. In order of belief:

1. the earliest recorded error that is not secondary;
2. a rank that ended without a record, as torchrun's own report names it, or torchrun itself;
3. the earliest secondary error.
"""

from __future__ import annotations

import json
import re
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AGENT_LOG = "torchrun.log"

_ROOT_CAUSE = re.compile(
    r"Root Cause.*?^\s*rank\s*:\s*(?P<rank>\d+).*?^\s*exitcode\s*:\s*(?P<code>-?\d+)",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Failure:
    """The failure that ended a run."""

    rank: int | None
    """None: torchrun itself failed."""
    host: str
    kind: str
    """The exception's type, or the signal's name."""
    message: str
    log: Path
    exit_code: int
    """What zinf exits with."""


def forget_errors(run_dir: Path) -> None:
    """Remove what the ranks of an earlier run recorded in the same folder."""
    for file in _error_files(run_dir):
        file.unlink(missing_ok=True)


def any_recorded(run_dir: Path) -> bool:
    """Whether a rank has recorded an error yet."""
    return bool(_error_files(run_dir))


def first_failure(run_dir: Path, agent_code: int | None) -> Failure | None:
    """The failure that ended the run; None if nothing failed.

    `agent_code` is the exit code of torchrun's agent as subprocess gives it, negative for a signal; None
    while the agent runs.
    """
    records: list[dict[str, Any]] = [json.loads(file.read_text()) for file in _error_files(run_dir)]
    first = min(records, key=lambda record: (record["secondary"], record["time"]), default=None)
    if agent_code and (first is None or first["secondary"]):
        silent = _silent_failure(run_dir, agent_code)
        if silent.rank not in {record["rank"] for record in records}:
            return silent
    if first is None:
        return None
    return Failure(
        rank=first["rank"],
        host=first["host"],
        kind=first["kind"],
        message=first["message"],
        log=run_dir / "logs" / f"rank-{first['rank']:05d}.log",
        exit_code=first["exit_code"],
    )


def _silent_failure(run_dir: Path, agent_code: int) -> Failure:
    """What torchrun reports as its root cause, or its own end where it reports none.

    A rank ends without a record when it dies before it has a guard, or when the guard is killed.
    """
    log = run_dir / "logs" / AGENT_LOG
    report = _ROOT_CAUSE.search(log.read_text(errors="replace"))
    rank = int(report["rank"]) if report else None
    code = int(report["code"]) if report else agent_code
    kind = signal.Signals(-code).name if code < 0 else "exit"
    ending = f"killed by {kind}" if code < 0 else f"ended with exit code {code}"
    return Failure(
        rank=rank,
        host=socket.gethostname(),
        kind=kind,
        message=f"{ending}, and left no record of an error" if report else f"torchrun itself: {ending}",
        log=log,
        exit_code=1,
    )


def _error_files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "logs").glob("error-*.json"))
