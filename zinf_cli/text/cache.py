"""The user's cache, which keeps results that take long to compute. Only its owner can read it: it holds texts."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder of the user's cache. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "zinf" / name


def private_folder(folder: Path) -> None:
    """Make a `cache_folder` with mode 0700. If the user already has it, it gets that mode."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        folder.chmod(0o700)


def identity(file: Path) -> tuple[int, int, int, int]:
    """Numbers that change when a file's content does: a write changes ctime, which nobody can put back."""
    status = file.stat()
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
