"""A run as its folder tells it: recipe, plan, every step, how it ended. What is missing or damaged is left out."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from zinf_cli.errors import UsageError
from zinf_cli.plan.plan import Plan
from zinf_cli.run_folder.error_records import errors_in
from zinf_cli.run_folder.folder import plan_in
from zinf_cli.run_folder.log_end import last_lines
from zinf_cli.run_folder.metrics import HELD_OUT, lines_in
from zinf_cli.run_folder.names import LOGS, RECIPE, SUMMARY, TRACE, rank_log
from zinf_cli.trace import summarise_trace

_LAST_LINES = 15


@dataclass(frozen=True)
class Failed:
    """The first failure of a run."""

    error: str
    """One line."""
    log: str
    """Its file, in the run's folder."""
    lines: Sequence[str]
    """The end of it."""


@dataclass(frozen=True)
class Run:
    """A run, ended or not."""

    folder: Path
    name: str
    recipe_text: str
    recipe: dict[str, Any]
    """Value by key, as in "train.seq_len"."""
    plan: Plan | None
    """None where there is none that this zinf can read."""
    lines: Sequence[dict[str, Any]]
    """Those of metrics.jsonl."""
    summary: dict[str, Any]
    """Empty while the run goes on, and where its launcher was killed."""
    failed: Failed | None

    @property
    def status(self) -> str:
        """done, failed or interrupted; "not ended" where nothing says how it ended."""
        return str(self.summary.get("status", "failed" if self.failed else "not ended"))

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of steps."""
        return [line for line in self.lines if "loss" in line]

    @property
    def held_out(self) -> list[str]:
        """The names of held-out texts, as their losses come; "" is all of them together, or the only one."""
        before = f"{HELD_OUT}/"
        keys = dict.fromkeys(key for line in self.lines for key in line if key == HELD_OUT or key.startswith(before))
        return ["" if key == HELD_OUT else key.removeprefix(before) for key in keys]

    def curve(self, key: str, per: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a key of metrics.jsonl where it is, both float64; NaN where a value is not finite.

        With `per`, values are divided by those of that key; NaN where that is 0.
        """
        lines = [line for line in self.lines if key in line]
        values = np.array([_number(line[key]) for line in lines], dtype=np.float64)
        if per is not None:
            whole = np.array([_number(line.get(per)) for line in lines], dtype=np.float64)
            values = np.divide(values, whole, out=np.full_like(values, np.nan), where=whole != 0)
        return np.array([line["step"] for line in lines], dtype=np.float64), values

    @property
    def hosts(self) -> list[tuple[str, int, int]]:
        """(name, ranks, steps in which the others waited for it) of each host."""
        waited = Counter(line.get("straggler") for line in self.steps)
        found, rank = [], 0
        for host in self.plan.hosts if self.plan is not None else ():
            ranks = range(rank, rank + len(host.slots))
            found.append((host.name, len(ranks), sum(waited[number] for number in ranks)))
            rank += len(ranks)
        return found

    def to_json(self) -> dict[str, Any]:
        """What `zinf report --json` prints of it."""
        lanes = None
        with suppress(UsageError):
            lanes = summarise_trace(self.folder / TRACE)
        return {
            "run": str(self.folder),
            "name": self.name,
            "status": self.status,
            "summary": self.summary or None,
            "error": None if self.failed is None else self.failed.error,
            "recipe": self.recipe,
            "plan": None if self.plan is None else self.plan.to_json(),
            "metrics": list(self.lines),
            "hosts": [{"host": host, "ranks": ranks, "waited_for": waited} for host, ranks, waited in self.hosts],
            "lanes": lanes,
        }


def read_run(folder: Path) -> Run:
    """The run in `folder`; UsageError if there is none."""
    try:
        text = (folder / RECIPE).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(
            f"no run here: {RECIPE}: {error.strerror}", where=str(folder), hint="give a run's folder, its output_dir"
        ) from error
    return Run(
        folder,
        folder.absolute().name,
        text,
        _keys_of(text),
        plan_in(folder),
        lines_in(folder),
        summary := _summary_in(folder),
        _failed(folder, summary),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in `folders`. Those whose folders have one name are called by their paths."""
    runs = [read_run(folder) for folder in folders]
    names = Counter(run.name for run in runs)
    return [run if names[run.name] == 1 else _renamed(run) for run in runs]


def _renamed(run: Run) -> Run:
    return Run(**{**vars(run), "name": str(run.folder)})


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _keys_of(text: str) -> dict[str, Any]:
    with suppress(yaml.YAMLError, ValueError, RecursionError):
        tree = yaml.safe_load(text)
        if isinstance(tree, dict):
            return {
                f"{section}.{name}" if name else str(section): value
                for section, part in tree.items()
                for name, value in (part.items() if isinstance(part, dict) else [("", part)])
            }
    return {}


def _summary_in(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        document = json.loads((folder / SUMMARY).read_text())
        return document if isinstance(document, dict) else {}
    return {}


def _failed(folder: Path, summary: dict[str, Any]) -> Failed | None:
    """As the launcher has told it; if it could not, by the earliest record of a rank."""
    with suppress(KeyError, TypeError, ValueError):
        if summary:
            told, first = summary["error"], summary["first_failure"]
            rank, host, log = first["rank"], first["host"], f"{LOGS}/{Path(first['log']).name}"
        else:
            record = min(errors_in(folder), key=lambda record: (record["secondary"], record["time"]))
            told, rank, host, log = record["error"]["message"], record["rank"], record["host"], rank_log(record["rank"])
        who = host if rank is None else f"{host}, rank {rank}"
        return Failed(f"{who}: {told}", log, last_lines(folder / log, _LAST_LINES))
    return None
