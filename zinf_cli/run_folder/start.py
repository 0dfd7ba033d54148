"""Tells the launcher where a run begins. Rank 0 writes it when the state is loaded and metrics.jsonl is ready."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from zinf_cli.durable import write_durably
from zinf_cli.errors import TierError
from zinf_cli.run_folder.names import START


def announce(run_dir: Path, step: int, checkpoint: Path | None) -> None:
    """Tell that the run begins after `step`, the state in `checkpoint`. TierError if that can't be written."""
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
    (run_dir / START).unlink(missing_ok=True)
