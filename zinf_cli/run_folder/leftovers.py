"""Finds and removes what a killed run leaves in its folder. Its nameless files on drives vanish with it."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from zinf_cli.checkpoint.folder import remains_of, remove_remain, set_aside_in
from zinf_cli.checkpoint.own_files import own_files
from zinf_cli.checkpoint.reading import names_in
from zinf_cli.checkpoint.verify import verify
from zinf_cli.durable import final_name
from zinf_cli.errors import UsageError
from zinf_cli.run_folder.made_folders import abandoned_in, remove_empty
from zinf_cli.run_folder.names import LOGS, PLAN, RECIPE

_WRITTEN = re.compile(
    r"recipe\.yaml|plan\.json|metrics\.jsonl|summary\.json|trace\.json|report\.html|start\.json|(error|trace)-\d+\.json"
)
"""Files of a run that are renamed when they are whole (durable.py)."""

_MARK = re.compile(r"\.[0-9a-f]{32}")


@dataclass(frozen=True)
class Leftover:
    """A file or a folder that nobody uses any more. Of a folder, only what a run wrote into it counts."""

    run_dir: Path
    path: Path
    what: str
    num_bytes: int
    keep: bool = False
    """Whether it stays, unless the user says otherwise."""


def leftovers_of(path: Path, damaged: bool = False) -> list[Leftover]:
    """The leftovers of the run in `path`, or of every run in that folder. A run that is alive has none.

    Checkpoints that were set aside as damaged stay. With `damaged` each of them is read again. It is removed, too,
    unless it is whole or its drive does not give it.
    """
    if not path.is_dir():
        raise UsageError("no such folder", where=str(path), hint="give a run's folder, or the one that runs are in")
    runs = [path] if _is_run(path) else sorted(filter(_is_run, path.iterdir()))
    found = []
    for run_dir in runs:
        with _held(run_dir) as idle:
            if idle:
                found += [
                    *_leftovers(run_dir),
                    *(_set_aside(run_dir, folder, damaged) for folder in set_aside_in(run_dir)),
                ]
    return found


def remove(leftover: Leftover) -> list[Path]:
    """Remove it, unless a run has begun in its folder meanwhile. Returns the files that stay: no run wrote them."""
    with _held(leftover.run_dir) as idle:
        still = [*remains_of(leftover.run_dir), *set_aside_in(leftover.run_dir), *_files(leftover.run_dir)]
        if idle and leftover.path in still:
            return remove_remain(leftover.path)
        if idle and leftover.path == _nvme(leftover.run_dir):
            remove_empty([leftover.path])
        for record, folders in abandoned_in(leftover.run_dir) if idle else ():
            if leftover.path == record:
                remove_empty(folders)
                record.unlink(missing_ok=True)
    return []


def marks_in(run_dir: Path) -> list[Path]:
    """The marks of launches: empty files named by their ids (runner.py)."""
    marks = [run_dir / name for name in names_in(run_dir) if _MARK.fullmatch(name)]
    return [mark for mark in marks if mark.is_file() and mark.stat().st_size == 0]


def _is_run(path: Path) -> bool:
    return (path / RECIPE).is_file() and (path / PLAN).is_file()


def _leftovers(run_dir: Path) -> Iterator[Leftover]:
    for path in remains_of(run_dir):
        what = "a checkpoint that was not finished" if path.is_dir() else "a file that was not finished"
        yield Leftover(run_dir, path, what, _size(path))
    for path in _files(run_dir):
        what = "a launch's mark" if _MARK.fullmatch(path.name) else "a file that was not finished"
        yield Leftover(run_dir, path, what, _size(path))
    for record, folders in abandoned_in(run_dir):
        names = ", ".join(str(folder) for folder in folders if folder.is_dir())
        yield Leftover(run_dir, record, f"a record of folders on drives{': ' if names else ''}{names}", _size(record))
    if (nvme := _nvme(run_dir)).is_dir() and not any(nvme.iterdir()):
        yield Leftover(run_dir, nvme, "an empty folder", 0)


def _set_aside(run_dir: Path, folder: Path, damaged: bool) -> Leftover:
    what = "a checkpoint that was set aside as damaged"
    if not damaged:
        return Leftover(run_dir, folder, f"{what}; --damaged removes it", _size(folder), keep=True)
    verdicts = verify(folder)
    problem = next((f"{v.name}: {v.problem}" for v in verdicts if v.damaged), None)
    if problem is not None:
        return Leftover(run_dir, folder, f"{what} ({problem})", _size(folder))
    unread = next((f"{v.name}: {v.problem}" for v in verdicts if v.problem), None)
    found = unread or "it is whole after all: name it step-... again to resume from it"
    return Leftover(run_dir, folder, f"{what}; {found}", _size(folder), keep=True)


def _files(run_dir: Path) -> list[Path]:
    """Files of a run that has ended, which nobody reads any more."""
    names = [*names_in(run_dir), *(f"{LOGS}/{name}" for name in names_in(run_dir / LOGS))]
    paths = [run_dir / name for name in names if _is_being_written(Path(name).name)]
    return [path for path in paths if path.is_file() or path.is_symlink()] + marks_in(run_dir)


def _is_being_written(name: str) -> bool:
    return final_name(name) != name and _WRITTEN.fullmatch(final_name(name)) is not None


def _nvme(run_dir: Path) -> Path:
    """The folder for nameless files on drives, unless a recipe names another."""
    return run_dir / "nvme"


def _size(path: Path) -> int:
    """Bytes that it takes on the drive."""
    files = own_files(path) if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_blocks * 512 for file in files)


@contextmanager
def _held(run_dir: Path) -> Iterator[bool]:
    """Whether no run is at work in the folder. No run can begin inside this context."""
    lock = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(lock)
