"""Holds a run's folder on one host, and mirrors it to the launcher.

What ranks append to their logs and metrics is sent to the launcher at once. So the launcher has it all,
even if the host is lost a moment later. If the launcher sees the same folder (this machine, a shared file system),
nothing is sent. Standard library only, as supervisor.py.
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
from zinf_cli.run_folder.names import LOGS, METRICS, RUN_FILES, set_aside

_MARK = ".launch"
"""A file in a mirrored folder that names its launch."""
_RENAMED = re.compile(r"(start|error-\d+)\.json")
"""Files in logs/ that a rank writes under another name (durable.py). It may be killed before it renames them."""
_CHUNK_BYTES = 1 << 18
_PARTS = (LOGS, "")
"""Folders in the run's folder that are mirrored. The last is the run's folder itself: of it, only metrics.jsonl is."""


class RunFolder:
    """The folder `path` of the run of a launch. `nvme` are its folders on drives."""

    def __init__(self, path: str, nvme: Sequence[str], launch_id: str) -> None:
        self.path = Path(path)
        self.mirrored = False
        """Whether the launcher sees another folder than this one."""
        self.behind = False
        """Whether the last call of `news` has left something out."""
        self._nvme = [Path(folder) for folder in nvme]
        self._launch_id = launch_id
        self._sent: dict[str, int] = {}
        self._delivered: list[str] = []
        self._lock: int | None = None
        self._made = MadeFolders(self.path)
        self._own: list[Path] = []
        """The mirrored folder and its parents, as far as they were made for a launch."""

    def open(self, files: Mapping[str, str]) -> None:
        """Lock the folder, and write `files` into it unless it is the launcher's. OSError if another run has it.

        The launcher's own folder has a mark with the launch's id.
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
        """Mark the folder as this launch's. What another launch has left in it is moved to earlier/N.

        The mark also lists the folders that were made for a launch: by this one, maybe before it was cut off, or by
        another.
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
        """(name, offset, bytes) of what was appended since the last call: at most a chunk of each file."""
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
        """Give the folder up. In a mirrored folder, remove what the launcher has sent and what it has received."""
        if self.mirrored:
            partials = (path.name for path in (self.path / LOGS).glob(f"*{PARTIAL}"))
            half = [f"{LOGS}/{name}" for name in partials if _RENAMED.fullmatch(final_name(name))]
            for name in (*self._delivered, *self._sent, METRICS, _MARK, *half):
                with contextlib.suppress(OSError):  # an error here would hide the one that ended the run
                    (self.path / name).unlink()
        self.leave()

    def leave(self) -> None:
        """Give the folder up, and remove empty folders that were made for this run."""
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
