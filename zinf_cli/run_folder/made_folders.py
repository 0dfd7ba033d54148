"""Folders that a run makes on drives, and that go again however it ends; a folder that was there before stays.

Which ones were made stands in a record beside the run. Whoever made them holds the record locked; where nobody does, he
was killed, and the next run, or zinf clean, takes over. Standard library only, as supervisor.py.
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
    """Those of the run in `run_dir` on this host."""

    def __init__(self, run_dir: Path) -> None:
        self._record = run_dir / f"{_prefix()}{uuid.uuid4().hex}"
        self._lock: int | None = None
        self._made: list[Path] = []

    def make(self, folder: Path) -> None:
        """With its parents; OSError."""
        absent = missing(folder)
        if absent:
            self._note([*self._made, *absent])
        for part in absent:
            with contextlib.suppress(FileExistsError):  # made by another since then, and not ours
                part.mkdir()
                self._made.append(part)
        folder.mkdir(parents=True, exist_ok=True)

    def take_over(self) -> None:
        """What killed runs made in this place is ours to remove."""
        for record, folders in abandoned_in(self._record.parent):
            self._made += folders
            self._note(self._made)
            record.unlink(missing_ok=True)

    def remove(self) -> None:
        """Those that are empty, and the record."""
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
    """The folder and those above it, as far as they are not there; the highest first."""
    return [part for part in (folder, *folder.parents) if not os.path.lexists(part)][::-1]


def abandoned_in(run_dir: Path) -> list[tuple[Path, list[Path]]]:
    """(record, folders) of those on this host that made folders for the run and were killed."""
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
    """The last first: it lies in those before it."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError, ValueError):  # a damaged record may name anything
            folder.rmdir()


def _read(descriptor: int) -> list[Path]:
    """What a record says; nothing where a power cut emptied it."""
    try:
        names = json.loads(os.pread(descriptor, 1 << 20, 0))
    except ValueError:
        return []
    return [Path(name) for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _prefix() -> str:
    return f".made-{socket.gethostname()}-"
