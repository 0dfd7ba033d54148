"""Where a run begins: rank 0 says it when the state is loaded and metrics.jsonl is ready, the launcher reads it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from zinf_cli.durable import write_durably
from zinf_cli.errors import TierError
from zinf_cli.run_folder.names import START


def announce(run_dir: Path, step: int, checkpoint: Path | None) -> None:
    """The run begins after `step`, which is in `checkpoint`; TierError where that can't be written."""
    start = {"step": step, "checkpoint": str(checkpoint) if checkpoint else None}
    try:
        write_durably(run_dir / START, json.dumps(start))
    except OSError as error:
        raise TierError(f"can't be written: {error.strerror}", where=str(run_dir / START)) from error


def announced(run_dir: Path) -> int | None:
    """The step a run begins after; None while the ranks have not said so."""
    with suppress(OSError, ValueError):  # not there yet, or not whole
        step: int = json.loads((run_dir / START).read_text())["step"]
        return step
    return None


def forget(run_dir: Path) -> None:
    """What an earlier run said."""
    (run_dir / START).unlink(missing_ok=True)
