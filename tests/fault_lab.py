"""A drive that fails once: the nth call that reads, writes or names something in a folder does not do what it should.

Faults are put where Python meets the system: functions of `os`, and the files that `open` gives. The files underneath
are real. A fault is an error number, or a count shorter than what was asked for.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

PAGE = 4096
CALLS = {
    "read": ("read", "pread", "preadv", "readv"),
    "write": ("write", "pwrite", "pwritev", "writev"),
    "fsync": ("fsync", "fdatasync"),
    "rename": ("rename", "replace"),
    "fallocate": ("posix_fallocate",),
    "link": ("link", "symlink"),
    "open": ("open",),
    "mkdir": ("mkdir",),
    "unlink": ("unlink", "remove", "rmdir"),
    "stat": ("stat", "lstat"),
    "list": ("listdir", "scandir"),
}
"""Kind of call to the functions of `os`."""
HOW = {
    "read": ("EIO", "short"),
    "write": ("EIO", "ENOSPC", "short", "full"),
    "fsync": ("EIO", "ENOSPC"),
    "rename": ("EIO", "ENOSPC"),
    "fallocate": ("EIO", "ENOSPC", "full"),
    "link": ("EIO", "ENOSPC"),
    "open": ("EIO", "ENOSPC"),
    "mkdir": ("EIO", "ENOSPC"),
    "unlink": ("EIO",),
    "stat": ("EIO",),
    "list": ("EIO",),
}
"""What can go wrong with a kind of call; "full" is ENOSPC from then on."""
_BY_DESCRIPTOR = ("read", "write", "fsync", "fallocate")


@dataclass(frozen=True)
class Fault:
    """The `nth` call of a kind, in the whole process, fails."""

    kind: str
    nth: int
    how: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.nth}-{self.how}"


class FaultyFolder:
    """Counts the calls that reach `folder`, and fails one of them. `met` is what was called with, if it was."""

    def __init__(self, folder: Path, fault: Fault | None) -> None:
        self.folder = str(folder)
        self.fault = fault
        self.met: str | None = None
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._readlink = os.readlink

    @contextmanager
    def __call__(self) -> Iterator[FaultyFolder]:
        with mock.patch.multiple(os, **{  # type: ignore[call-overload]
            name: self._wrapped(kind, getattr(os, name)) for kind, names in CALLS.items() for name in names
        }):  # fmt: skip
            opened = self._opened(io.open)
            with mock.patch.object(io, "open", opened), mock.patch.object(builtins, "open", opened):
                yield self

    def due(self, kind: str, target: object) -> str | None:
        """How a call of `kind` on a path or descriptor is to fail; None: not at all."""
        path = self._path(target)
        if path is None or not path.startswith(self.folder):
            return None
        with self._lock:
            self.counts[kind] += 1
            fault = self.fault
            if fault is None or fault.kind != kind:
                return None
            if self.counts[kind] != fault.nth and not (fault.how == "full" and self.counts[kind] > fault.nth):
                return None
            self.met = path
            return "ENOSPC" if fault.how == "full" else fault.how

    def _path(self, target: object) -> str | None:
        if isinstance(target, int):
            try:
                return str(self._readlink(f"/proc/self/fd/{target}"))
            except OSError:
                return None
        return os.fsdecode(os.fspath(target)) if isinstance(target, (str, bytes, os.PathLike)) else None

    def _wrapped(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(target: Any = ".", *arguments: Any, **named: Any) -> Any:
            touched = arguments[0] if kind == "link" else target  # the new name is what is written
            how = self.due(kind, touched)
            if how is None:
                return call(target, *arguments, **named)
            if how == "short":
                return call(target, _shortened(arguments[0]), *arguments[1:], **named)
            raise self.error(how, None if kind in _BY_DESCRIPTOR else touched)

        return faulty

    def _opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`open`, whose files' reads and writes are calls as well."""

        def faulty(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
            newline: Any = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            path = self._path(file)
            if path is None or not path.startswith(self.folder):
                return call(file, mode, buffering, encoding, errors, newline, closefd, opener)
            if not isinstance(file, int) and (how := self.due("open", file)) is not None:
                raise self.error(how, file)
            raw = _File(self, file, mode.replace("b", "").replace("t", ""), closefd=closefd, opener=opener)
            wrap = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
            buffered: Any = wrap(raw) if buffering != 0 else raw
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)

        return faulty

    def error(self, how: str, path: object) -> OSError:
        number = getattr(errno, how)
        return OSError(number, os.strerror(number), *([os.fspath(path)] if path is not None else []))  # type: ignore[call-overload]


class _File(io.FileIO):
    """A file whose reads and writes may fail."""

    def __init__(self, drive: FaultyFolder, file: Any, mode: str, *, closefd: bool, opener: Any) -> None:
        super().__init__(file, mode, closefd=closefd, opener=opener)
        self._drive = drive

    def write(self, data: Any) -> int:
        return self._move("write", super().write, data)

    def readinto(self, into: Any) -> int:
        return self._move("read", super().readinto, into)

    def readall(self) -> bytes:
        how = self._drive.due("read", self.fileno())
        if how not in (None, "short"):
            raise self._drive.error(how, None)
        return super().readall()  # CPython's own goes on after short counts

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return self.readall()
        into = bytearray(size)
        return bytes(into[: self.readinto(into)])

    def _move(self, kind: str, call: Callable[[Any], int], data: Any) -> int:
        how = self._drive.due(kind, self.fileno())
        if how is None:
            return call(data)
        if how == "short":
            return call(_shortened(data))
        raise self._drive.error(how, None)


def _shortened(asked: Any) -> Any:
    """Half of what a call was to move; direct I/O stops at whole pages."""
    if isinstance(asked, int):
        return max(1, asked // 2)
    if isinstance(asked, (list, tuple)):
        return [_shortened(asked[0])]
    view = memoryview(asked).cast("B")
    half = len(view) // 2
    return view[: half - half % PAGE if half >= PAGE else max(1, half) if len(view) < PAGE else len(view)]


class StuckError(Exception):
    """Something waits for what will never come."""


@contextmanager
def watchdog(seconds: int) -> Iterator[None]:
    """Raise StuckError in the main thread when the time is up; stuck threads are daemons."""

    def bark(*_: object) -> None:
        raise StuckError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
