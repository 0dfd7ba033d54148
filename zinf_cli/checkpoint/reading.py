"""Reading what was written once and checked: a drive or a network may answer wrong once and right the next time.

Short reads go on where they stopped. An I/O error or content that is not what was written is read again, past the page
cache, before anyone judges. What is then still other content is damage; what the drive does not give says nothing of
what is on it.
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
    """What `call` returns; called again where an error may pass. UnreadableError of `path` where it does not.

    That there is no such file is an answer, and raised as it is.
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
    """Whether there is such a name; UnreadableError where that can't be known."""
    try:
        patiently(path.stat, path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_folder(path: Path) -> bool:
    """Whether it is a folder, or a link to one; UnreadableError where that can't be known."""
    try:
        return stat.S_ISDIR(patiently(path.stat, path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def names_in(folder: Path) -> list[str]:
    """What is in a folder, sorted; nothing where there is none. UnreadableError where that can't be known."""
    try:
        return sorted(patiently(lambda: os.listdir(folder), folder))  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_checked(descriptor: int, into: memoryview, offset: int, xxh3: str, path: Path) -> bool:
    """Read len(into) bytes of a file from `offset` on; whether they are, at last, those of the checksum."""
    for _ in range(ATTEMPTS):
        read = patiently(lambda: _read(descriptor, into, offset), path)
        os.posix_fadvise(descriptor, offset, len(into), os.POSIX_FADV_DONTNEED)  # if read again, then from the drive
        if read == len(into) and f"{checksum(into):016x}" == xxh3:
            return True
    return False


def read_whole(path: Path, is_right: Callable[[bytes], bool]) -> bytes | None:
    """A small file; None where its content is not right however often it is read."""
    for _ in range(ATTEMPTS):
        content = patiently(lambda: _read_file(path), path)
        if is_right(content):
            return content
    return None


def _read(descriptor: int, into: memoryview, offset: int) -> int:
    """Bytes read: all, but at the end of the file."""
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
