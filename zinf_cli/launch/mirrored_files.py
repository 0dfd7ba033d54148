"""What the ranks of a host write into the run's folder there, as the launcher keeps it (run_folder/mirror.py)."""

from __future__ import annotations

import os
from pathlib import Path


class MirroredFiles:
    """The files of one host in the launcher's folder of the run. Parts of them come in the order of their bytes."""

    def __init__(self, run_dir: Path, most_late: int) -> None:
        self._run_dir = run_dir
        self._most_late = most_late
        self._late: list[tuple[str, int, bytes]] = []
        """What the launcher's drive has not taken yet."""
        self._paths: dict[str, Path] = {}
        """By the names that the host has for them."""

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Write as much as the launcher's drive takes, and keep the rest for the next call: at most `most_late` bytes.

        A full drive here ends no run.
        """
        self._late.append((name, offset, data))
        try:
            while self._late:
                self._write(*self._late[0])
                del self._late[0]
        except OSError:
            self._paths.clear()  # somebody may have moved the folder
        while sum(len(data) for _, _, data in self._late) > self._most_late:
            del self._late[0]

    def _write(self, name: str, offset: int, data: bytes) -> None:
        path = self._path(name)
        if path is None:
            return
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if offset == 0 else 0), 0o644)
        try:
            while data:  # a drive that is nearly full takes a part
                taken = os.pwrite(descriptor, data, offset)
                data, offset = data[taken:], offset + taken
        finally:
            os.close(descriptor)

    def _path(self, name: str) -> Path | None:
        """Where a file lies. None if that is not in the run's folder, where no host may write."""
        if name not in self._paths:
            path = (self._run_dir / name).resolve()
            if not path.is_relative_to(self._run_dir.resolve()):
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            self._paths[name] = path
        return self._paths[name]
