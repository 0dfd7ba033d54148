"""The checkpoints of a run: where they lie, which are there, which is the newest; and how one appears and goes.

A checkpoint exists when its manifest does. The manifest is written beside its name, synced and renamed when everything
else is on the drive, and it is the first thing to go when a checkpoint is removed. So a crash at any moment leaves
whole checkpoints, and folders without a manifest, which are nothing.

What is removed is what a run wrote (own_files.py): checkpoints/ may hold a user's folders and files as well.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from zinf_cli.checkpoint.manifest import MANIFEST, UNFINISHED, Manifest
from zinf_cli.checkpoint.own_files import own_files, remove
from zinf_cli.checkpoint.reading import exists, is_folder, names_in
from zinf_cli.durable import PARTIAL, sync_folder, write_durably
from zinf_cli.errors import CheckpointError

FOLDER, LATEST = "checkpoints", "latest"
_STEP = re.compile(r"step-(\d{8,})")
_DAMAGED = "damaged-"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}
"""What file systems answer that have no symbolic links."""
_SET_ASIDE = re.compile(rf"{_DAMAGED}{_STEP.pattern}(-\d+)?")


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step a checkpoint's folder is named by; -1 where it is not named so."""
    named = _STEP.fullmatch(folder.name)
    return int(named[1]) if named else -1


def steps_done(folder: Path) -> int:
    """The step of a checkpoint, whatever its folder is called."""
    return step_of(folder) if step_of(folder) >= 0 else Manifest.load(folder).step


def is_checkpoint(folder: Path) -> bool:
    """UnreadableError where that can't be known."""
    return exists(folder / MANIFEST)


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    return sorted(filter(is_checkpoint, _step_folders(run_dir)), key=step_of, reverse=True)


def set_aside_in(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that were found damaged."""
    return _folders(run_dir, _SET_ASIDE)


def made_by_runs(run_dir: Path) -> list[Path]:
    """All that runs have put into checkpoints/, whole or damaged, and the link to the newest."""
    link = run_dir / FOLDER / LATEST
    return _step_folders(run_dir) + set_aside_in(run_dir) + [link] * _is_latest(link)


def remains_of(run_dir: Path) -> list[Path]:
    """What a killed run left of checkpoints: folders without a manifest, a link that was to be renamed."""
    half = [folder for folder in _step_folders(run_dir) if not is_checkpoint(folder) and not folder.is_symlink()]
    link = run_dir / FOLDER / f"{LATEST}{PARTIAL}"
    return [folder for folder in half if own_files(folder) or not names_in(folder)] + [link] * _is_latest(link)


def remove_remains(run_dir: Path) -> list[Path]:
    """Remove what is nothing, while no run is at work in `run_dir`; what is not a run's stays and is returned."""
    left = []
    for path in remains_of(run_dir):
        left += remove_remain(path)
    folder = run_dir / FOLDER
    if not checkpoints_of(run_dir) and _is_latest(folder / LATEST):
        (folder / LATEST).unlink()
    with suppress(OSError):
        folder.rmdir()  # only where it is empty
    return left


def remove_remain(path: Path) -> list[Path]:
    """Remove one of `remains_of`; what is not a run's stays and is returned."""
    if path.is_dir() and not path.is_symlink():
        return remove(path)
    path.unlink(missing_ok=True)
    return []


def kept_back(paths: Sequence[Path]) -> str:
    """A line for the user of what was not removed with checkpoints."""
    names = ", ".join(str(path) for path in paths[:8])
    return f"not removed, since zinf did not write it: {names}{', ...' if len(paths) > 8 else ''}"


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of the run in it; CheckpointError where there is none."""
    if is_checkpoint(path):
        return path.resolve()
    found = checkpoints_of(path)
    if found:
        return found[0]
    if not exists(path):
        raise CheckpointError("no such folder", where=str(path), hint="give a run's folder or one of its checkpoints")
    raise CheckpointError(
        "no checkpoint here: there is no manifest.json, nor a whole checkpoint in checkpoints/",
        where=str(path),
        hint="runs write checkpoints where checkpoint.interval is set",
    )


def checkpoints_to_resume(output_dir: Path, resume: str | Path) -> list[Path]:
    """What checkpoint.resume ("auto", "never" or a path) means for a run in `output_dir`: tried in this order.

    auto falls back to older ones, a path does not. CheckpointError where there is none at a path.
    """
    if isinstance(resume, Path):
        return [find_checkpoint(resume)]
    return checkpoints_of(output_dir) if resume == "auto" else []


def begin(folder: Path) -> None:
    """A folder for a new checkpoint; one of the same name is removed first."""
    if folder.is_symlink() or folder.is_file():
        what = "link" if folder.is_symlink() else "file"
        raise CheckpointError(
            f"a {what}, where a checkpoint is to be written", where=str(folder), hint=f"rename the {what}"
        )
    remove(folder)
    folder.mkdir(parents=True, exist_ok=True)


def announce(folder: Path, names: Sequence[str]) -> None:
    """Say what is written into `folder` from now on, so that it can be told from what others put there."""
    write_durably(folder / UNFINISHED, json.dumps({"files": names}))


def commit(folder: Path, manifest: bytes) -> None:
    """Make the checkpoint exist: everything else in `folder` is on the drive."""
    write_durably(folder / MANIFEST, manifest)
    with suppress(OSError):
        (folder / UNFINISHED).unlink(missing_ok=True)
    for directory in (folder.parent, folder.parent.parent):
        sync_folder(directory)


def point_latest(run_dir: Path) -> None:
    """Let the link `latest` lead to the newest checkpoint."""
    for newest in checkpoints_of(run_dir)[:1]:
        point_latest_to(newest)


def point_latest_to(folder: Path) -> None:
    """Let the link `latest` lead to a checkpoint, unless a user (or a copy of the run) has its place."""
    link = folder.parent / LATEST
    if os.path.lexists(link) and not _is_latest(link):
        return
    partial = folder.parent / f"{LATEST}{PARTIAL}"
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(folder.name)
        partial.rename(link)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        if error.errno not in _NO_LINKS:
            raise
    sync_folder(folder.parent)


def set_damaged_aside(run_dir: Path, damaged: Sequence[Path]) -> None:
    """Rename checkpoints that are not whole, so that they are neither resumed from nor kept instead of whole ones."""
    for folder in damaged:
        aside, number = folder.with_name(f"{_DAMAGED}{folder.name}"), 1
        while os.path.lexists(aside):
            number += 1
            aside = folder.with_name(f"{_DAMAGED}{folder.name}-{number}")
        folder.rename(aside)
        sync_folder(folder.parent)
    point_latest(run_dir)


def keep_latest(newest: Path, count: int) -> list[Path]:
    """Remove all but the `count` newest checkpoints up to `newest`; what is not a run's stays and is returned.

    Later ones are of an earlier life of the run, which could not read them; they count for nothing.
    """
    left = []
    run_dir = newest.parent.parent
    there = [folder for folder in checkpoints_of(run_dir) if step_of(folder) <= step_of(newest)]
    half = [folder for folder in remains_of(run_dir) if 0 <= step_of(folder) < step_of(newest)]  # could not be removed
    for folder in there[count:] + half:
        left += remove(folder)
    return left


def _is_latest(link: Path) -> bool:
    """Whether it is the link that a run makes."""
    return link.is_symlink() and _STEP.fullmatch(Path(os.readlink(link)).name) is not None  # noqa: PTH115


def _step_folders(run_dir: Path) -> list[Path]:
    return _folders(run_dir, _STEP)


def _folders(run_dir: Path, named: re.Pattern[str]) -> list[Path]:
    """Folders in checkpoints/ and links to such; a file of such a name is a user's."""
    paths = [run_dir / FOLDER / name for name in names_in(run_dir / FOLDER) if named.fullmatch(name)]
    return [path for path in paths if is_folder(path)]
