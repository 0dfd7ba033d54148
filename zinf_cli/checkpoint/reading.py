"""Reads with patience: a drive or a network may answer wrong once and right the next time.

A short read goes on where it stopped. After an I/O error, or if content is not as it was written, the bytes are read
again, past the page cache. If the content is then still different, it is damaged. If the drive still gives nothing,
that says nothing about what is on it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from zinf_cli.checksum import checksum
from zinf_cli.errors import UnreadableError

ATTEMPTS = 3
_MAY_PASS = {errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.EINTR}
_T = TypeVar("_T")


def patiently(call: Callable[[], _T], path: Path) -> _T:
    """What `call` returns. It is called again while an error may pass; if it does not, UnreadableError names `path`.

    The error that there is no such file is an answer, and is raised as it is.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            if error.errno not in _MAY_PASS or attempt == ATTEMPTS:
                raise unreadable(path, error) from error
    raise AssertionError


def unreadable(path: Path, error: OSError) -> UnreadableError:
    return UnreadableError(
        f"can't be read: {error.strerror or error}",
        where=str(path),
        hint="it may be whole, so nothing of it is moved: look at the drive, then start again",
    )


def exists(path: Path) -> bool:
    """Whether `path` exists. UnreadableError if the drive does not tell."""
    try:
        patiently(path.stat, path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder, or a link to one. UnreadableError if the drive does not tell."""
    try:
        return stat.S_ISDIR(patiently(path.stat, path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none if there is no folder. UnreadableError if the drive does not tell."""
    try:
        return sorted(patiently(lambda: os.listdir(folder), folder))  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_checked(descriptor: int, into: memoryview, offset: int, xxh3: str, path: Path) -> bool:
    """Read len(into) bytes of a file from `offset` on. False if they don't match the checksum, however often read."""
    for _ in range(ATTEMPTS):
        read = patiently(lambda: _read(descriptor, into, offset), path)
        os.posix_fadvise(descriptor, offset, len(into), os.POSIX_FADV_DONTNEED)  # another read comes from the drive
        if read == len(into) and f"{checksum(into):016x}" == xxh3:
            return True
    return False


def read_whole(path: Path, is_right: Callable[[bytes], bool]) -> bytes | None:
    """The content of a small file. None if it is not right, however often it is read."""
    for _ in range(ATTEMPTS):
        content = patiently(lambda: _read_file(path), path)
        if is_right(content):
            return content
    return None


def _read(descriptor: int, into: memoryview, offset: int) -> int:
    """Fill `into`. Returns the bytes read, which are fewer only at the end of the file."""
    done = 0
    while done < len(into) and (count := os.preadv(descriptor, [into[done:]], offset + done)):
        done += count
    return done


def _read_file(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        content = bytearray(os.fstat(descriptor).st_size)
        with memoryview(content) as memory:
            read = _read(descriptor, memory, 0)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return bytes(content[:read])
    finally:
        os.close(descriptor)
