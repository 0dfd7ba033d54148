"""Which rank failed first, and why.

When one rank dies the others fail a moment later in a collective, and torchrun terminates whoever is left.
Only the first failure helps the user, and exit codes can't tell it. So each rank records its own error in
`logs/error-00003.json` (written by train/rank_process.py), with the time and whether it is *secondary*, that
is caused by the loss of a peer; a rank killed by a signal is recorded by its guard. In order of belief:

1. the earliest recorded error that is not secondary;
2. a host that was lost, with its connection or its supervisor;
3. a rank that ended without a record, as torchrun's own report names it, or torchrun itself;
4. the earliest secondary error.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zinf_cli.launch.logs import last_lines
from zinf_cli.recipe.hosts import Host

_ROOT_CAUSE = re.compile(
    r"Root Cause.*?^\s*rank\s*:\s*(?P<rank>\d+).*?^\s*exitcode\s*:\s*(?P<code>-?\d+)",
    re.DOTALL | re.MULTILINE,
)

_REPORT_LINES = 1000
"""Of torchrun's report, the last that its agent says."""


@dataclass(frozen=True)
class Failure:
    """The failure that ended a run."""

    rank: int | None
    """None: torchrun itself failed, or the host was lost."""
    host: str
    local_rank: int | None
    kind: str
    """The exception's type, or the signal's name."""
    message: str
    log: Path
    exit_code: int
    """What zinf exits with."""

    @property
    def place(self) -> str:
        """The rank and its host, as an error line names them."""
        return self.host if self.rank is None else f"{self.host}:rank {self.rank}"


@dataclass(frozen=True)
class Ending:
    """How a host's part of a run ended. While all is well both are None, or the code 0."""

    host: Host
    first_rank: int
    log: Path
    """Of torchrun's agent."""
    code: int | None
    """The exit code of torchrun's agent as subprocess gives it, negative for a signal; None while it runs."""
    lost: str | None
    """Why the host is no longer there."""


def forget_errors(run_dir: Path) -> None:
    """Remove what the ranks of an earlier run recorded in the same folder."""
    for file in _error_files(run_dir):
        file.unlink(missing_ok=True)


def any_recorded(run_dir: Path) -> bool:
    """Whether a rank has recorded an error yet."""
    return bool(_error_files(run_dir))


def first_failure(run_dir: Path, endings: Sequence[Ending]) -> Failure | None:
    """The failure that ended the run; None if nothing failed."""
    records = list(_records(run_dir))
    first = min(records, key=lambda record: (record["secondary"], record["time"]), default=None)
    if first is None or first["secondary"]:
        recorded = {record["rank"] for record in records}
        silent = [_silent_failure(ending) for ending in sorted(endings, key=lambda ending: ending.lost is None)]
        unexplained = [failure for failure in silent if failure is not None and failure.rank not in recorded]
        if unexplained:
            return unexplained[0]
    if first is None:
        return None
    host, local_rank = first["host"], None
    for ending in endings:
        if 0 <= first["rank"] - ending.first_rank < len(ending.host.slots):
            host, local_rank = ending.host.name, first["rank"] - ending.first_rank
    return Failure(
        rank=first["rank"],
        host=host,
        local_rank=local_rank,
        kind=first["kind"],
        message=first["message"],
        log=run_dir / "logs" / f"rank-{first['rank']:05d}.log",
        exit_code=first["exit_code"],
    )


def _silent_failure(ending: Ending) -> Failure | None:
    """A lost host, what torchrun reports as its root cause, or its own end where it reports none.

    A rank ends without a record when it dies before it has a guard, or when the guard is killed.
    """
    if ending.lost is not None:
        return Failure(None, ending.host.name, None, "lost", ending.lost, ending.log, exit_code=1)
    if not ending.code:
        return None
    report = _ROOT_CAUSE.search("\n".join(last_lines(ending.log, _REPORT_LINES)))
    rank = int(report["rank"]) if report else None
    code = int(report["code"]) if report else ending.code
    kind = signal.Signals(-code).name if code < 0 else "exit"
    how = f"killed by {kind}" if code < 0 else f"ended with exit code {code}"
    return Failure(
        rank=rank,
        host=ending.host.name,
        local_rank=None if rank is None else rank - ending.first_rank,
        kind=kind,
        message=f"{how}, and left no record of an error" if report else f"torchrun itself: {how}",
        log=ending.log,
        exit_code=1,
    )


def _records(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Those that can be read: a full drive, or a mirror of it, may hold half of one."""
    for file in _error_files(run_dir):
        with suppress(OSError, ValueError):
            yield json.loads(file.read_text())


def _error_files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "logs").glob(f"error-{'[0-9]' * 5}.json"))
