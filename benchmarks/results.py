"""What a run of a benchmark measured, as a file in benchmarks/results/: figures, machine, versions and command.

A benchmark calls `report` once for each case. The rows are printed; with `--save` they are saved, too. The tables of
benchmarks/README.md are made from the saved files (tables.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.rows import Row, markdown

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Result:
    """One run of one case. What is not known is None."""

    date: str
    """Year, month and day: 2026-11-29."""
    benchmark: str
    """The module in benchmarks/ that measured, or what else did."""
    case: str
    command: str | None
    machine: dict[str, Any]
    """cpu: its model; architecture; cores that the process may use; memory_bytes; accelerator."""
    versions: dict[str, str | None]
    """Of python, torch, transformers; of zinf, its commit."""
    note: str | None
    rows: Sequence[Row]
    """Lines of the table. The end of a key says what is measured in which unit: rows.py."""
    measured: Any = None
    """What the rows were calculated from, such as the seconds of every step."""

    @property
    def source(self) -> str:
        """Date, machine, versions and note in a line."""
        machine, versions = self.machine, self.versions
        processor = machine["cpu"] or machine["architecture"]
        parts = [self.date]
        if machine["cores"] is not None:
            parts.append(f"{machine['cores']} cores" + (f" of {processor}" if processor else ""))
        parts += [str(machine["accelerator"])] if machine["accelerator"] else []
        parts += [f"{name} {found}" for name, found in versions.items() if found]
        return ", ".join(parts + ([self.note] if self.note else []))


def add_save(parser: argparse.ArgumentParser) -> None:
    """Add `--save`. Call it before anything is measured: the commit of a result is the one of this moment."""
    versions()
    parser.add_argument(
        "--save", action="store_true", help="keep what is measured: a file a case in benchmarks/results/"
    )


def report(
    case: str,
    rows: Sequence[Row],
    save: bool,
    note: str | None = None,
    measured: Any = None,
    folder: Path | None = None,
) -> None:
    """Print the rows; with `save`, write them to a new file that is named after today, the benchmark and the case.

    The file lies in RESULTS, or in `folder`.
    """
    found = Result(time.strftime("%Y-%m-%d"), _program(), case, _command(), here(), versions(), note, rows, measured)
    print(f"{found.source}: {case}\n{markdown(rows)}", flush=True)
    if save:
        print(f"saved: {write(found, folder or RESULTS)}", flush=True)


def write(result: Result, folder: Path) -> Path:
    """A new file; a second run of a case on one day has a name that ends with -2."""
    folder.mkdir(exist_ok=True)
    name = f"{result.date}-{result.benchmark}-{_plain(result.case)}"
    path, number = folder / f"{name}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.json"
    path.write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n")
    return path


def read(path: Path) -> Result:
    return Result(**json.loads(path.read_text()))


def here() -> dict[str, Any]:
    """This machine."""
    models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": models[0] if models else None,
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@cache
def versions() -> dict[str, str | None]:
    """zinf's is its commit, with -dirty if files differ from it; None outside of a clone."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), **packages, "zinf": commit or None}


def _program() -> str:
    """The benchmark that runs: `run` of `python -m benchmarks.run`."""
    return Path(sys.argv[0]).stem


def _command() -> str:
    return shlex.join(["python", "-m", f"benchmarks.{_program()}", *sys.argv[1:]])


def _plain(case: str) -> str:
    """A case's name as part of a file's: small letters, digits, points and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", case.lower().replace("×", "x")).strip("-")
