"""Makes the folders of a run on drives, and removes them however it ends. A folder that was there before stays.

A record beside the run lists them. The process that made them holds a lock on the record. If nobody holds it, that
process was killed, and the next run, or zinf clean, removes the folders. Standard library only, as supervisor.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import uuid
from pathlib import Path


class MadeFolders:
    """The folders that this process makes for the run in `run_dir`."""

    def __init__(self, run_dir: Path) -> None:
        self._record = run_dir / f"{_prefix()}{uuid.uuid4().hex}"
        self._lock: int | None = None
        self._made: list[Path] = []

    def make(self, folder: Path) -> None:
        """Make a folder with its parents. OSError if that fails."""
        absent = missing(folder)
        if absent:
            self._note([*self._made, *absent])
        for part in absent:
            with contextlib.suppress(FileExistsError):  # another process has made it meanwhile
                part.mkdir()
                self._made.append(part)
        folder.mkdir(parents=True, exist_ok=True)

    def take_over(self) -> None:
        """Take over the folders that killed runs have made here, to remove them."""
        for record, folders in abandoned_in(self._record.parent):
            self._made += folders
            self._note(self._made)
            record.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folders that are empty, and the record."""
        remove_empty(self._made)
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._record.unlink()
            os.close(self._lock)
        self._lock, self._made = None, []

    def _note(self, folders: list[Path]) -> None:
        if self._lock is None:
            self._lock = os.open(self._record, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        text = json.dumps([str(folder) for folder in folders]).encode()
        os.pwrite(self._lock, text, 0)
        os.ftruncate(self._lock, len(text))
        os.fsync(self._lock)


def missing(folder: Path) -> list[Path]:
    """The folder and its parents, as far as they do not exist. The highest comes first."""
    return [part for part in (folder, *folder.parents) if not os.path.lexists(part)][::-1]


def abandoned_in(run_dir: Path) -> list[tuple[Path, list[Path]]]:
    """(record, folders) of processes on this host that have made folders for the run and were killed."""
    found = []
    for record in sorted(run_dir.glob(f"{_prefix()}*")):
        with contextlib.suppress(OSError):
            descriptor = os.open(record, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append((record, _read(descriptor)))
            finally:
                os.close(descriptor)
    return found


def remove_empty(folders: list[Path]) -> None:
    """Remove the folders that are empty. The last comes first, since it lies in those before it."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError, ValueError):  # a damaged record may name anything
            folder.rmdir()


def _read(descriptor: int) -> list[Path]:
    """The folders in a record. The list is empty if a power cut has emptied it."""
    try:
        names = json.loads(os.pread(descriptor, 1 << 20, 0))
    except ValueError:
        return []
    return [Path(name) for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _prefix() -> str:
    return f".made-{socket.gethostname()}-"
