"""What Weights & Biases has written of a run offline: its file of records, which is LevelDB's log format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 32 << 10
_FILE_HEADER, _HEADER = 7, 7
"""A piece of a record begins with 4 bytes of checksum, 2 of its size and 1 that says whether it is the last."""
_WHOLE, _LAST = 1, 4


@dataclass
class OfflineRun:
    """A run as it would be uploaded."""

    known_as: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None


def offline_runs(run_dir: Path) -> list[OfflineRun]:
    """Those in wandb/ of a run's folder, in the order of their folders' names, which begin with the time."""
    return [_read(path) for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))]


def _read(path: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record

    found = OfflineRun()
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("run"):
            found.known_as, found.project = record.run.run_id, record.run.project
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.HasField("history"):
            items = [(item.key or ".".join(item.nested_key), item.value_json) for item in record.history.item]
            found.history.append({key: json.loads(value) for key, value in items})
        elif record.HasField("exit"):
            found.exit_code = record.exit.exit_code
    return found


def _records(data: bytes) -> Iterator[bytes]:
    at, record = _FILE_HEADER, b""
    while at + _HEADER <= len(data):
        if _BLOCK_BYTES - at % _BLOCK_BYTES < _HEADER:
            at += _BLOCK_BYTES - at % _BLOCK_BYTES
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + _HEADER : at + _HEADER + size]
        at += _HEADER + size
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""
