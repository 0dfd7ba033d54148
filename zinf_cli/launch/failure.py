"""Finds which rank failed first, and why.

When one rank dies, the others fail a moment later in a collective, and torchrun ends the rest. Only the first failure
helps the user, and exit codes don't tell it. So each rank records its own error in `logs/error-00003.json`
(train/rank_process.py), with the time and whether it is *secondary*, which means that the loss of a peer has caused it.
If a signal kills a rank, its guard makes the record. The failure that counts is the first of these that exists:

1. the earliest recorded error that is not secondary;
2. a host that was lost, with its connection or its supervisor;
3. a rank without a record that torchrun's agent names, or the agent's own error, or the end of the agent;
4. the earliest secondary error.

An error keeps all that it has where it is raised: its place, its hint, its exit code and whether a restart may help.
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
    """The error as it was raised on the host."""
    log: Path
    raised: bool = False
    """Whether the rank has raised the error itself: it was not killed, and no peer has caused it."""

    def reported(self, *, log: bool) -> ReportedError:
        """The error for the user: its place names host and rank. With `log` its hint names the log."""
        told = self.error.to_json()
        told["where"] = inside(self.host if self.rank is None else f"{self.host}:rank {self.rank}", told["where"])
        if log:
            told["hint"] = "; ".join(filter(None, (told["hint"], f"log: {self.log}")))
        return ReportedError(**told)


@dataclass(frozen=True)
class Ending:
    """How a host's part of a run ended. While all is well `lost` is None, and `code` is None or 0."""

    host: Host
    first_rank: int
    log: Path
    """The log of torchrun's agent."""
    code: int | None
    """The exit code of torchrun's agent, negative for a signal as in subprocess. None while it runs."""
    lost: str | None
    """Why the host is gone; None while it is there."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """What the agent has said of a failure (train/agent.py): "rank" and its exit "code", or the agent's own "error"."""


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
    """What the agent has said of a failure, in the last line of `output`. Empty if it was killed."""
    with suppress(ValueError):
        for line in output.splitlines()[-1:]:
            return dict(json.loads(line).get("failed", {}))
    return {}


def _silent_failure(ending: Ending) -> Failure | None:
    """The failure of a host without a record: the host was lost, or its agent has reported something, or just ended.

    A rank ends without a record if it dies before it has a guard, or if the guard is killed.
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
