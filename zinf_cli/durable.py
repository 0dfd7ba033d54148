"""Files that survive a power cut: a name is given when the content is on the drive, and is then on the drive itself.

Whoever finds a file under its final name finds all of it, whatever ended its writer. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial"
"""How the name ends under which a file is written."""
_BEING_WRITTEN = re.compile(rf"(?P<name>.+)\.\d+{re.escape(PARTIAL)}")
_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE of Linux."""
_CANT_SYNC_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
"""What file systems answer that keep names without being asked, or never (some network and FUSE file systems)."""


def write_durably(path: Path, content: bytes | str, mode: int = 0o666) -> None:
    """Write a file whole or not at all, in place of one that is there; `mode` is limited by the umask.

    What is no regular file (a pipe, /dev/stdout) is written to. OSError leaves what was there, and nothing else.
    """
    data = content.encode() if isinstance(content, str) else content
    path = Path(os.path.realpath(path))  # a link stays one
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # two processes may write the same file
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:  # noqa: PTH123
            file.write(data)
        publish(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def final_name(name: str) -> str:
    """What the file `name` is to be called once it is written: another name while it is not."""
    being_written = _BEING_WRITTEN.fullmatch(name)
    return being_written["name"] if being_written else name


def reserve(folder: Path, num_bytes: int) -> int | None:
    """The descriptor of a nameless file with room for `num_bytes`, for `write_reserved`; None where none is to be had.

    What has to be said when a drive is full has its place there already, and a process that is killed leaves nothing.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor
    return None


def write_reserved(descriptor: int, path: Path, content: bytes) -> None:
    """Write a file whole into what was reserved for it, once, where none has its name; OSError leaves nothing."""
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))
    os.fsync(descriptor)
    os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor)  # which makes it follow the link there
    sync_folder(path.parent)


def reserve_behind(descriptor: int, num_bytes: int) -> None:
    """Room behind the end of a file for what will be appended, where its file system can do that.

    The file is as long as before. What is not used stays with the file.
    """
    end = os.fstat(descriptor).st_size
    ctypes.CDLL(None).fallocate(descriptor, _KEEP_SIZE, ctypes.c_int64(end), ctypes.c_int64(num_bytes))


def publish(partial: Path, path: Path) -> None:
    """Give a file, or a folder with all that is in it, its final name: synced before, the name after."""
    for folder, _, names in os.walk(partial):
        for name in names:
            _sync(Path(folder, name))
        sync_folder(Path(folder))
    if not partial.is_dir():
        _sync(partial)
    partial.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where its file system knows how to."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _CANT_SYNC_FOLDERS:
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
