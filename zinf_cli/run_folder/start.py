"""Tells the launcher where a run begins, and before that how much of its state is loaded. Rank 0 writes it."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from zinf_cli.durable import write_durably
from zinf_cli.errors import TierError
from zinf_cli.run_folder.names import LOADING, START
from zinf_cli.told import Tell


def tells_loaded(run_dir: Path) -> Tell:
    """What tells the launcher the share that is loaded, twice a second at most. That it can't be told is no error."""
    told = time.monotonic()

    def tell(share: float) -> None:
        nonlocal told
        if time.monotonic() >= told + 0.5:
            told = time.monotonic()
            with suppress(OSError), (run_dir / LOADING).open("a") as file:
                file.write(f"{share:.4f}\n")

    return tell


def loaded(run_dir: Path) -> float | None:
    """The share of the state that is loaded. None if the ranks have not told it."""
    with suppress(OSError, ValueError, IndexError):
        return float((run_dir / LOADING).read_text().split()[-1])
    return None


def announce(run_dir: Path, step: int, checkpoint: Path | None) -> None:
    """Tell that state and metrics.jsonl are there, and the run begins after `step`, as in `checkpoint`.

    TierError if that can't be written.
    """
    start = {"step": step, "checkpoint": str(checkpoint) if checkpoint else None}
    try:
        write_durably(run_dir / START, json.dumps(start))
    except OSError as error:
        raise TierError(f"can't be written: {error.strerror}", where=str(run_dir / START)) from error


def announced(run_dir: Path) -> int | None:
    """The step after which a run begins. None as long as the ranks have not told it."""
    with suppress(OSError, ValueError):  # not there yet, or not whole
        step: int = json.loads((run_dir / START).read_text())["step"]
        return step
    return None


def forget(run_dir: Path) -> None:
    """Remove what an earlier run has told."""
    for name in (START, LOADING):
        (run_dir / name).unlink(missing_ok=True)
