"""Files without a name on drives: whether a folder can hold state, how it is written, and which file system it is.

Everything that asks this asks here, and is answered by a file that was made and written: a mount that turned
read-only after an error still calls itself writable, and a file system that takes O_DIRECT may use the page cache all
the same. Linux says of a file how direct I/O has to be aligned (statx, since 6.1), or that there is none; btrfs does
not say, and writes past the page cache only what it does not checksum. Standard library only, as the launcher asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import re
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from zinf_cli.amounts import format_bytes
from zinf_cli.errors import PreflightError
from zinf_cli.model_state import PAGE

GROWTH = 4 * 2**20
"""Of state on drives, where it takes more than was reserved for it."""
FULL = (errno.ENOSPC, errno.EDQUOT)

_TMPFS, _RAMFS, _BTRFS, _BCACHEFS, _ZFS, _NILFS = 0x01021994, 0x858458F6, 0x9123683E, 0xCA451A4E, 0x2FC12FC1, 0x3434
_OVERLAY = 0x794C7630
_IN_MEMORY = (_TMPFS, _RAMFS)
_COPY_ON_WRITE = (_BTRFS, _BCACHEFS, _ZFS, _NILFS)
_GET_FLAGS, _SET_FLAGS, _NO_COPY_ON_WRITE = 0x80086601, 0x40086602, 0x00800000
_BTRFS_INFO, _BTRFS_INFO_BYTES, _BTRFS_ID = 0x8400941F, 1024, slice(16, 32)
_EMPTY_PATH, _DIRECT_ALIGNMENT = 0x1000, 0x2000
_AT_MASK, _AT_ALIGNMENTS = 0, 152
_STATX_BYTES = _STATFS_BYTES = 256


@dataclass(frozen=True)
class NamelessFile:
    """An open file that no name leads to; the descriptor is the caller's to close."""

    descriptor: int
    direct: bool
    """Whether it is read and written past the page cache."""
    in_memory: bool
    """Whether the file system is memory: tmpfs."""
    in_place: bool
    """Whether a rewrite takes no more space than is allocated."""


def open_nameless(folder: Path, key: str = "offload.nvme_path", shown: Path | None = None) -> NamelessFile:
    """A new, empty file in `folder`, made if need be, that can be written; PreflightError where that is not to be had.

    The error names `shown`, by default the folder, and the recipe's `key`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _create(folder)
    except OSError as error:
        raise _refusal(f"can't create a file: {error.strerror}", shown or folder, key) from error
    try:
        kind = _kind(descriptor)
        in_place = kind not in _COPY_ON_WRITE or _write_in_place(descriptor)
        direct = set_direct(descriptor)
        if not direct:
            _write(descriptor)
        os.ftruncate(descriptor, 0)
    except OSError as error:
        os.close(descriptor)
        raise _refusal(f"can't write a file: {error.strerror}", shown or folder, key) from error
    return NamelessFile(descriptor, direct, kind in _IN_MEMORY, in_place)


def set_direct(descriptor: int) -> bool:
    """Switch a file to O_DIRECT if that gets past the page cache with this program's alignment; whether it does.

    Its first bytes are written once more. On a full drive that is not tried; what needs the space says what is missing.
    """
    kind, alignment = _kind(descriptor), _alignment(descriptor)
    if kind in _IN_MEMORY or (kind == _BTRFS and not _flags(descriptor) & _NO_COPY_ON_WRITE):
        return False
    if alignment is None and kind == _OVERLAY and _kernel() >= (6, 6):
        return (
            False  # the file system below is tmpfs, which accepts O_DIRECT since then, or one of those that do not say
        )
    if alignment is not None and not 0 < alignment <= PAGE:
        return False
    buffered = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, buffered | os.O_DIRECT)
        _write(descriptor)
    except OSError:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, buffered)
        return False
    return True


def why_buffered(descriptor: int) -> str:
    """What to tell the user of a file that is not direct."""
    if _kind(descriptor) in _IN_MEMORY:
        return "this is memory (tmpfs), not a drive: what lies here takes CPU memory"
    return "no O_DIRECT here, using buffered I/O (the page cache counts as CPU memory)"


def what_is_left(descriptor: int, error: OSError) -> str:
    """Why a file can't be as large as it should: a limit on the size of files, or a quota."""
    if error.errno == errno.EDQUOT:
        return f"more than the quota there allows ({error.strerror})"
    status = os.fstatvfs(descriptor)
    taken = os.fstat(descriptor).st_blocks * 512
    return f"{format_bytes(status.f_bavail * status.f_frsize + taken)} are left ({error.strerror})"


def file_system_of(descriptor: int) -> str:
    """The same for two files exactly if they share space. Subvolumes of btrfs differ in all that stat says."""
    if _kind(descriptor) == _BTRFS:
        info = bytearray(_BTRFS_INFO_BYTES)
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, _BTRFS_INFO, info)
            return info[_BTRFS_ID].hex()
    return str(os.fstat(descriptor).st_dev)


def file_system_at(folder: Path) -> str:
    """`file_system_of` what is made in a folder, which need not be there yet."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        descriptor = os.open(existing, os.O_RDONLY)
    except PermissionError:
        descriptor = os.open(existing, os.O_PATH)
    try:
        return file_system_of(descriptor)
    finally:
        os.close(descriptor)


def _create(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS):
            raise
    descriptor, name = tempfile.mkstemp(dir=folder)
    try:
        os.unlink(name)  # noqa: PTH108
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _write(descriptor: int) -> None:
    """Write the first page as they are: unlike a read of what was never written, this is checked."""
    with mmap.mmap(-1, PAGE) as page, memoryview(page) as memory:
        try:
            os.preadv(descriptor, [memory], 0)
            os.pwritev(descriptor, [memory], 0)
        except OSError as error:
            if error.errno not in FULL:
                raise


def _write_in_place(descriptor: int) -> bool:
    """Have an empty file's blocks overwritten where they are; False where the file system always takes new ones."""
    try:
        fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("l", _flags(descriptor) | _NO_COPY_ON_WRITE))
    except OSError:
        return False
    return bool(_flags(descriptor) & _NO_COPY_ON_WRITE)


def _flags(descriptor: int) -> int:
    """What lsattr shows, as bits."""
    flags = bytearray(struct.calcsize("l"))
    with contextlib.suppress(OSError):
        fcntl.ioctl(descriptor, _GET_FLAGS, flags)
    return int.from_bytes(flags[:4], "little")


def _kind(descriptor: int) -> int:
    """The file system's magic number; 0 where it is not to be had."""
    status = ctypes.create_string_buffer(_STATFS_BYTES)
    if ctypes.CDLL(None).fstatfs(descriptor, status) != 0:
        return 0
    return int(struct.unpack_from("l", status)[0]) & 0xFFFFFFFF


def _alignment(descriptor: int) -> int | None:
    """What direct I/O of the file has to be a multiple of; 0 where there is none; None where nobody says."""
    try:
        statx = ctypes.CDLL(None).statx
    except AttributeError:
        return None
    status = ctypes.create_string_buffer(_STATX_BYTES)
    if statx(descriptor, b"", _EMPTY_PATH, _DIRECT_ALIGNMENT, status) != 0:
        return None
    if not struct.unpack_from("I", status, _AT_MASK)[0] & _DIRECT_ALIGNMENT:
        return None
    in_memory, in_file = struct.unpack_from("II", status, _AT_ALIGNMENTS)
    return max(in_memory, in_file) if in_memory and in_file else 0


def _kernel() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", platform.release())[:2]))


def _refusal(what: str, folder: Path, key: str) -> PreflightError:
    return PreflightError(what, where=str(folder), hint=f"choose another {key}")
