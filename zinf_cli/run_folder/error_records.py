"""Records of why ranks failed. A rank, or its guard, writes one as it ends; the launcher reads them."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from zinf_cli.durable import reserve, write_durably, write_reserved
from zinf_cli.run_folder.names import LOGS, error_file, files_of_ranks

_RECORD = re.compile(r"error-\d{5}\.json")
_RECORD_BYTES = 2**16
_MOST_SAID = 2**12
"""Characters of a traceback that a record on a full drive has. In JSON, each takes at most 6 bytes."""


@dataclass(frozen=True)
class ErrorRecord:
    """What `logs/error-00003.json` holds."""

    rank: int
    pid: int
    error: dict[str, Any]
    """The fields of an error (errors.py)."""
    traceback: str = ""
    secondary: bool = False
    """Whether a peer has caused it: by its loss, or by an error that the peer records itself."""
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""


class ErrorPlace:
    """The place of a rank's record. It takes its room at the start, since a full drive is a reason to fail."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._path = run_dir / error_file(rank)
        self._reserved = reserve(self._path.parent, _RECORD_BYTES)

    def write(self, record: ErrorRecord) -> None:
        """Write the record, whole or not at all: the launcher may be reading."""
        try:
            write_durably(self._path, _as_json(record))
        except OSError:
            if self._reserved is None:
                raise
            short = replace(record, traceback=record.traceback[-_MOST_SAID:])
            write_reserved(self._reserved, self._path, _as_json(short).encode())


def _as_json(record: ErrorRecord) -> str:
    return json.dumps(asdict(record), indent=1)


def errors_in(run_dir: Path) -> list[dict[str, Any]]:
    """The records that can be read. A full drive, or a mirror of it, may hold half of one, which is left out."""
    found = []
    for file in files_of_ranks(run_dir, "error"):
        with suppress(OSError, ValueError):
            found.append(json.loads(file.read_text()))
    return found


def any_recorded(run_dir: Path) -> bool:
    """Whether a rank has recorded an error yet. It looks at names alone: there may be tens of thousands of files."""
    with suppress(OSError), os.scandir(run_dir / LOGS) as entries:
        return any(_RECORD.fullmatch(entry.name) for entry in entries)
    return False  # somebody has moved the folder


def forget_errors(run_dir: Path) -> None:
    """Remove the records of an earlier run in the same folder."""
    for file in files_of_ranks(run_dir, "error"):
        file.unlink(missing_ok=True)
