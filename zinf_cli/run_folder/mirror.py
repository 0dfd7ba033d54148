"""A run's folder on one host, and how much of it the launcher has already.

What ranks append to their logs, metrics and event files is sent to the launcher as it comes, so that the launcher's
folder has it all even if the host is lost a moment later. Where the launcher sees the same folder (this machine, a
shared file system) there is nothing to send. Standard library only, as supervisor.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from zinf_cli.durable import PARTIAL, final_name
from zinf_cli.run_folder.made_folders import MadeFolders, missing, remove_empty
from zinf_cli.run_folder.names import LOGS, METRICS, RUN_FILES, TENSORBOARD, set_aside

_MARK = ".launch"
"""In a folder that is mirrored: the launch it belongs to."""
_RENAMED = re.compile(r"(start|error-\d+)\.json")
"""In logs/: what a rank writes under another name, and may be killed before it has renamed it (durable.py)."""
_CHUNK_BYTES = 1 << 18
_PARTS = (LOGS, TENSORBOARD, "")
"""Folders of the run's folder that are mirrored; of the last, itself, only metrics.jsonl."""


class RunFolder:
    """The folder `path` of the launch `launch_id`; `nvme` are its folders on drives."""

    def __init__(self, path: str, nvme: Sequence[str], launch_id: str) -> None:
        self.path = Path(path)
        self.mirrored = False
        """Whether the launcher sees another folder than this one."""
        self.behind = False
        """Whether the last call of `news` left something out."""
        self._nvme = [Path(folder) for folder in nvme]
        self._launch_id = launch_id
        self._sent: dict[str, int] = {}
        self._delivered: list[str] = []
        self._lock: int | None = None
        self._made = MadeFolders(self.path)
        self._own: list[Path] = []
        """Of a mirror: the folder itself and those above it, as far as they were made for a launch."""

    def open(self, files: Mapping[str, str]) -> None:
        """Lock the folder and write `files` into it, unless the launcher sees it; OSError if another run has it.

        The launcher marks its own folder with the launch's id.
        """
        try:
            self._open(files)
        except OSError:
            self._made.remove()
            self._unlock()
            raise

    def _open(self, files: Mapping[str, str]) -> None:
        made = missing(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / f".{self._launch_id}").exists():
            lock = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise OSError(0, "another run is using this folder", str(self.path)) from None
            self._lock, self.mirrored = lock, True
            self._claim(made)
            for name, text in files.items():
                (self.path / name).write_text(text, encoding="utf-8")
                self._delivered.append(name)
        (self.path / LOGS).mkdir(exist_ok=True)
        self._made.take_over()
        for folder in self._nvme:
            self._made.make(folder)

    def _claim(self, made: list[Path]) -> None:
        """Mark the folder as this launch's; what another left in it goes to earlier/N, neither mixed nor lost.

        The mark also tells which folders were made for a launch: by this one, by it before it was cut off, by another.
        """
        mark = self.path / _MARK
        owner, *before = mark.read_text(encoding="utf-8", errors="replace").split("\n") if mark.exists() else [""]
        self._own = [*map(Path, before), *made]
        if owner == self._launch_id:
            return
        there = [self.path / name for name in RUN_FILES if (self.path / name).exists()]
        set_aside(self.path, there)
        mark.write_text("\n".join([self._launch_id, *map(str, self._own)]), encoding="utf-8")

    def news(self) -> Iterator[tuple[str, int, bytes]]:
        """(name, offset, bytes) of what was appended since the last call, at most a chunk of each file."""
        self.behind = False
        for name in self._names():
            offset = self._sent.get(name, 0)
            with contextlib.suppress(OSError):
                with (self.path / name).open("rb") as file:
                    file.seek(offset)
                    data = file.read(_CHUNK_BYTES)
                if data or name not in self._sent:
                    self._sent[name] = offset + len(data)
                    self.behind = self.behind or len(data) == _CHUNK_BYTES
                    yield name, offset, data

    def remove(self) -> None:
        """Give the folder up; of what was delivered, and what the launcher has too, nothing stays."""
        if self.mirrored:
            partials = (path.name for path in (self.path / LOGS).glob(f"*{PARTIAL}"))
            half = [f"{LOGS}/{name}" for name in partials if _RENAMED.fullmatch(final_name(name))]
            for name in (*self._delivered, *self._sent, METRICS, _MARK, *half):
                with contextlib.suppress(OSError):  # what ended the run is to be told, not this
                    (self.path / name).unlink()
        self.leave()

    def leave(self) -> None:
        """Give the folder up; empty ones that were made for this run go."""
        self._made.remove()
        if self.mirrored:
            remove_empty([*self._own, *(self.path / part for part in _PARTS if part)])
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _names(self) -> Iterator[str]:
        for part in _PARTS:
            with contextlib.suppress(OSError), os.scandir(self.path / part) as entries:
                for entry in entries:
                    name = os.path.join(part, entry.name)  # noqa: PTH118
                    if (part or name == METRICS) and not name.endswith(PARTIAL) and entry.is_file():
                        yield name
