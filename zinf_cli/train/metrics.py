"""metrics.jsonl and TensorBoard: one object a step, written by rank 0 as the step ends."""

from __future__ import annotations

import ctypes
import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zinf_cli.durable import write_durably

SCALARS = ("loss", "eval_loss", "lr", "grad_norm", "tokens_per_s", "tflops_per_rank", "wait_s", "step_s")
STRAGGLING = 0.2
"""Of a step: what the others have to wait for a rank to be called the slowest."""


class Metrics:
    """Appends to `run_dir`/metrics.jsonl, every line flushed; every `interval` steps to TensorBoard.

    A run that goes on after `step` keeps the lines up to there: what a crashed run wrote of later steps comes again.
    """

    def __init__(self, run_dir: Path, *, interval: int, tensorboard: bool, step: int = 0) -> None:
        path = run_dir / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step] if step else []
        write_durably(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")
        self._interval = interval
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, values: dict[str, Any]) -> None:
        """One line; `values` has "step". What is not finite becomes null, since JSON has no word for it."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._board is not None and values["step"] % self._interval == 0:
            for name in SCALARS:
                if name in values:
                    self._board.add_scalar(name, values[name], values["step"])

    def sync(self) -> None:
        """Return when every line is on the drive."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; a killed run may have left half of one."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def straggler_of(waits: Sequence[float], step_s: float) -> int | None:
    """The rank that the others wait for, by the seconds that each has waited in a step.

    All are done at the same time, so the slowest waits least. It counts where the others, by their median, wait a fifth
    of the step longer.
    """
    if len(waits) < 2:
        return None
    least = min(range(len(waits)), key=lambda rank: waits[rank])
    others = statistics.median(wait for rank, wait in enumerate(waits) if rank != least)
    return least if others - waits[least] > STRAGGLING * step_s else None


def return_free_memory() -> None:
    """Give the kernel the pages that malloc keeps of what was freed (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PeakMemory:
    """The peak resident memory of this process since the last `reset`, in bytes (Linux)."""

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        return process_memory().get("VmHWM", 0)


def process_memory() -> dict[str, int]:
    """Bytes of this process, by the names of proc_pid_status(5): VmRSS, VmHWM, RssFile and the like."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
