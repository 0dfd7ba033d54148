"""metrics.jsonl and TensorBoard: one object a step, written by rank 0 as the step ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

SCALARS = ("loss", "eval_loss", "lr", "grad_norm", "tokens_per_s", "tflops_per_rank", "wait_s", "step_s")


class Metrics:
    """Appends to `run_dir`/metrics.jsonl, every line flushed; every `interval` steps to TensorBoard."""

    def __init__(self, run_dir: Path, *, interval: int, tensorboard: bool) -> None:
        self._file = (run_dir / "metrics.jsonl").open("w", encoding="utf-8")
        self._interval = interval
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, values: dict[str, Any]) -> None:
        """One line; `values` has "step". What is not finite becomes null, since JSON has no word for it."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._board is not None and values["step"] % self._interval == 0:
            for name in SCALARS:
                if name in values:
                    self._board.add_scalar(name, values[name], values["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class PeakMemory:
    """The peak resident memory of this process since the last `reset`, in bytes (Linux)."""

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0
