"""A drive that is soon full: an ext4 file system of 64 MiB on a loop device, and what fills it to the last block."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB, BLOCK = 1 << 20, 4096


@contextmanager
def mounted_small_drive(folder: Path) -> Iterator[Path]:
    """In `folder`; the test is skipped where mounting is not permitted."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    image, mount = folder / "image", folder / "drive"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-qF", "-b", str(BLOCK), str(image)], check=True)
    done = subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=False, capture_output=True)
    if done.returncode != 0:
        pytest.skip("no loop devices here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def fill(drive: Path, leave: int = 0) -> Path:
    """Take all of it but `leave` bytes, those that are root's too; the file that has them."""
    subprocess.run(["sync", "-f", str(drive)], check=True)  # what is written without a block yet gets one first
    path = drive / "someone-elses"
    with path.open("wb") as file:
        step = 16 * MIB
        while step >= BLOCK:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_blocks * 512, step)
            except OSError:
                step //= 2
        if leave:
            os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_blocks * 512 - leave)
    return path
