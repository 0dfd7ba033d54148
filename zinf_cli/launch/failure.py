"""Which rank failed first, and why.

When one rank dies the others fail a moment later in a collective, and torchrun terminates whoever is left.
Only the first failure helps the user, and exit codes can't tell it. So each rank records its own error in
`logs/error-00003.json` (written by train/rank_process.py), with the time and whether it is *secondary*, that
is caused by the loss of a peer; a rank killed by a signal is recorded by its guard. In order of belief:

1. the earliest recorded error that is not secondary;
2. a host that was lost, with its connection or its supervisor;
3. a rank that ended without a record, as torchrun's agent names it, the agent's own error, or how the agent ended;
4. the earliest secondary error.

An error stays what it was where it was raised: its place, its hint, its exit code and whether a restart may help.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zinf_cli.errors import RankError, ReportedError, ZinfError, inside
from zinf_cli.recipe.hosts import Host
from zinf_cli.run_folder.error_records import errors_in
from zinf_cli.run_folder.names import rank_log


@dataclass(frozen=True)
class Failure:
    """The failure that ended a run."""

    rank: int | None
    """None: torchrun itself failed, or the host was lost."""
    host: str
    local_rank: int | None
    error: ZinfError
    """As it was raised there."""
    log: Path
    raised: bool = False
    """Whether the rank has raised it itself: it was not killed, and no peer is the cause."""

    def reported(self, *, log: bool) -> ReportedError:
        """The error as it is here: its place is on that host, of that rank. With `log` it names the log."""
        told = self.error.to_json()
        told["where"] = inside(self.host if self.rank is None else f"{self.host}:rank {self.rank}", told["where"])
        if log:
            told["hint"] = "; ".join(filter(None, (told["hint"], f"log: {self.log}")))
        return ReportedError(**told)


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
    report: Mapping[str, Any] = field(default_factory=dict)
    """What the agent said of a failure (train/agent.py): "rank" and its exit "code", or the "error" that ended it."""


def first_failure(run_dir: Path, endings: Sequence[Ending]) -> Failure | None:
    """The failure that ended the run; None if nothing failed."""
    records = errors_in(run_dir)
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
        error=ReportedError(**first["error"]),
        log=run_dir / rank_log(first["rank"]),
        raised=bool(first["traceback"]) and not first["secondary"],
    )


def report_in(output: str) -> dict[str, Any]:
    """What the agent has said of a failure, which is the last that it says; nothing where it was killed."""
    with suppress(ValueError):
        for line in output.splitlines()[-1:]:
            return dict(json.loads(line).get("failed", {}))
    return {}


def _silent_failure(ending: Ending) -> Failure | None:
    """A lost host, what its agent has reported, or the agent's own end where it reported nothing.

    A rank ends without a record when it dies before it has a guard, or when the guard is killed.
    """
    host, report = ending.host.name, ending.report
    if ending.lost is not None:
        return Failure(None, host, None, RankError(ending.lost), ending.log)
    if not ending.code:
        return None
    if "error" in report:
        return Failure(None, host, None, ReportedError(**report["error"]), ending.log)
    if "rank" in report:
        error = RankError(f"{_how(report['code'])}, and left no record of an error")
        return Failure(report["rank"], host, report["rank"] - ending.first_rank, error, ending.log)
    return Failure(None, host, None, RankError(f"torchrun itself: {_how(ending.code)}"), ending.log)


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
