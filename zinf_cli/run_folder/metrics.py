"""metrics.jsonl: one object a step. Rank 0 writes it when the step ends, and the launcher follows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zinf_cli.checkpoint.reading import exists, patiently
from zinf_cli.durable import write_durably
from zinf_cli.errors import TierError
from zinf_cli.run_folder.names import METRICS
from zinf_cli.run_folder.start import announced

_NUMBERS = (
    "tokens", "step_s", "tokens_per_s", "tflops_per_rank", "wait_s", "updated_in_backward",
    "device_bytes", "cpu_bytes", "nvme_bytes", "nvme_read_bytes", "nvme_write_bytes",
)  # fmt: skip
"""The numbers that every step's line has."""
_MOST_PENDING = 64 * 2**20
"""Most bytes of lines that wait for room on a full drive."""


HELD_OUT, ACCURACY = "eval_loss", "eval_accuracy"
"""The keys of a line for the loss over all held-out texts, and for the share of right choices."""


def held_out_of(name: str, what: str = HELD_OUT) -> str:
    """The key of a line for the loss, or `what` else, over the held-out text of that name; "" is all of them."""
    return f"{what}/{name}" if name else what


def sequences_of(source: int) -> str:
    """The key of a step's line for how many of its sequences are from a text that has a weight."""
    return f"sequences_of_{source}"


class Metrics:
    """Appends every line at once to `run_dir`/metrics.jsonl.

    A run that goes on after `step` keeps the lines up to there. Lines of a crashed run about later steps are dropped:
    these steps come again. A full drive does not end training: lines that it does not take are written later, and
    `notice` is told. TierError if the file can't be begun.
    """

    def __init__(self, run_dir: Path, notice: Callable[[str], None], step: int = 0) -> None:
        self.path = run_dir / METRICS
        self._notice = notice
        kept, damaged = _lines_until(step, self.path) if step else ([], 0)
        if damaged:
            notice(f"{self.path}: {damaged} lines are not as they were written, and left out")
        try:
            write_durably(self.path, b"".join(line + b"\n" for line in kept))
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise TierError(f"can't be written: {error.strerror}", where=str(self.path)) from error
        self._pending = b""
        self._said = False

    def write(self, values: dict[str, Any]) -> None:
        """Write one line. `values` has "step". Numbers that are not finite become null: JSON has no word for them."""
        finite = {name: value if _is_finite(value) else None for name, value in values.items()}
        self._pending += json.dumps(finite).encode() + b"\n"
        self._flush()

    def sync(self) -> None:
        """Return when every line is on the drive, as far as the drive takes them."""
        self._flush()
        self._try(lambda: os.fsync(self._file))

    def close(self) -> None:
        self._flush()
        self._try(lambda: os.close(self._file))

    def _flush(self) -> None:
        if self._try(self._write_pending):
            self._said = False
        self._pending = self._pending[-_MOST_PENDING:]

    def _write_pending(self) -> None:
        while self._pending:
            self._pending = self._pending[os.write(self._file, self._pending) :]

    def _try(self, call: Callable[[], object]) -> bool:
        """Whether `call` succeeded. A notice tells of the first time that the drive fails."""
        try:
            call()
        except OSError as error:
            if not self._said:
                self._notice(f"{self.path}: can't be written now: {error.strerror}; the run goes on")
            self._said = True
            return False
        return True


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def lines_in(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that are as they were written; none if there is no such file."""
    try:
        found = (run_dir / METRICS).read_bytes().split(b"\n")
    except OSError:
        return []
    return [json.loads(line) for line in found if _step_of(line) is not None]


def _lines_until(step: int, path: Path) -> tuple[list[bytes], int]:
    """(the lines up to `step`, the number of damaged lines). The end of the file may be half a line of a killed run.

    A power cut may have left anything.
    """
    if not exists(path):
        return [], 0
    *lines, rest = patiently(path.read_bytes, path).split(b"\n")
    steps = [(line, _step_of(line)) for line in lines]
    if _step_of(rest) is not None:
        steps.append((rest, _step_of(rest)))
    return [line for line, at in steps if at is not None and at <= step], sum(at is None for _, at in steps)


def _step_of(line: bytes) -> int | None:
    """The step of a line. None if no run has written such a line."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    if isinstance(step, bool) or not isinstance(step, int):
        return None
    numbers = _NUMBERS if "loss" in values else ()
    nullable = [values.get(name) for name in ("loss", "eval_loss", "lr", "grad_norm")]
    if not all(isinstance(values.get(name), (int, float)) for name in numbers):
        return None
    return step if all(value is None or isinstance(value, (int, float)) for value in nullable) else None


@dataclass
class Watch:
    """Follows metrics.jsonl."""

    run_dir: Path
    show: Callable[[dict[str, Any]], None]
    lines: list[dict[str, Any]] = field(default_factory=list)
    first_step: int | None = None
    """The last step of the run before this one. None as long as the ranks have not said it."""
    _offset: int = 0

    def poll(self) -> None:
        if self.first_step is None:
            self.first_step = announced(self.run_dir)
        path = self.run_dir / METRICS
        if self.first_step is not None and path.exists():
            with suppress(OSError), path.open("rb") as file:  # later, if the drive does not give it now
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    with suppress(ValueError):  # damaged, which the ranks say when they go on
                        self.lines.append(json.loads(line))
                        if self.lines[-1]["step"] > self.first_step or not self.first_step:
                            self.show(self.lines[-1])
