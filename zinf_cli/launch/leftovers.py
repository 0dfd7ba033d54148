"""What a killed run leaves in its folder. Its files on drives have no name and are gone with it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from zinf_cli.checkpoint.folder import DAMAGED, remains_of
from zinf_cli.checkpoint.folder import FOLDER as CHECKPOINTS
from zinf_cli.errors import UsageError
from zinf_cli.launch.mirror import STOP_FILE


@dataclass(frozen=True)
class Leftover:
    """A file or a folder that nobody will use again."""

    run_dir: Path
    path: Path
    what: str
    num_bytes: int


def leftovers_of(path: Path) -> list[Leftover]:
    """Of the run in `path`, or of every run in it; a run that is alive has none."""
    if not path.is_dir():
        raise UsageError("no such folder", where=str(path))
    runs = [path] if _is_run(path) else sorted(filter(_is_run, path.iterdir()))
    found = []
    for run_dir in runs:
        with _held(run_dir) as idle:
            found += list(_leftovers(run_dir)) if idle else []
    return found


def remove(leftover: Leftover) -> None:
    """Remove it, unless a run has begun in its folder meanwhile."""
    with _held(leftover.run_dir) as idle, contextlib.suppress(FileNotFoundError):
        if idle and leftover.path.is_dir() and not leftover.path.is_symlink():
            shutil.rmtree(leftover.path)
        elif idle:
            leftover.path.unlink()


def _is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() and (path / "plan.json").is_file()


def _leftovers(run_dir: Path) -> Iterator[Leftover]:
    for path in remains_of(run_dir):
        what = "a checkpoint that was not finished" if path.is_dir() else "a file that was not finished"
        yield Leftover(run_dir, path, what, _size(path))
    for path in sorted((run_dir / CHECKPOINTS).glob(f"{DAMAGED}*")):
        yield Leftover(run_dir, path, "a damaged checkpoint", _size(path))
    for path in sorted([*run_dir.glob("*.partial"), *(run_dir / "logs").glob("*.partial")]):
        yield Leftover(run_dir, path, "a file that was not finished", _size(path))
    if (run_dir / STOP_FILE).exists():
        yield Leftover(run_dir, run_dir / STOP_FILE, "a request to stop", 0)
    nvme = run_dir / "nvme"
    if nvme.is_dir() and not any(nvme.iterdir()):
        yield Leftover(run_dir, nvme, "an empty folder", 0)


def _size(path: Path) -> int:
    """Bytes on the drive."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_blocks * 512 for file in files)


@contextmanager
def _held(run_dir: Path) -> Iterator[bool]:
    """Whether no run is at work in the folder; none begins while this lasts."""
    lock = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(lock)
