"""Finds, adds and removes the checkpoints of a run.

A checkpoint exists if its manifest exists. When all else is on the drive, the manifest is written under another name,
synced and renamed. When a checkpoint is removed, its manifest is removed first. So a crash at any moment leaves whole
checkpoints, and folders without a manifest, which count as nothing.

Only files that a run wrote are ever removed (own_files.py): checkpoints/ may hold a user's files as well.
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

FOLDER = "checkpoints"
LATEST, BEST = LINKS = "latest", "best"
"""Links to the newest checkpoint, and to that with the lowest held-out loss."""
_STEP = re.compile(r"step-(\d{8,})")
_DAMAGED = "damaged-"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}
"""Error numbers of file systems that have no symbolic links."""
_SET_ASIDE = re.compile(rf"{_DAMAGED}{_STEP.pattern}(-\d+)?")


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder. -1 if its name has none."""
    named = _STEP.fullmatch(folder.name)
    return int(named[1]) if named else -1


def steps_done(folder: Path) -> int:
    """The step of a checkpoint, whatever its folder is called."""
    return step_of(folder) if step_of(folder) >= 0 else Manifest.load(folder).step


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a checkpoint. UnreadableError if the drive does not tell."""
    return exists(folder / MANIFEST)


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    return sorted(filter(is_checkpoint, _step_folders(run_dir)), key=step_of, reverse=True)


def set_aside_in(run_dir: Path) -> list[Path]:
    """The checkpoints of a run that were found damaged."""
    return _folders(run_dir, _SET_ASIDE)


def made_by_runs(run_dir: Path) -> list[Path]:
    """All that runs have put into checkpoints/, whole or damaged, with the links to the newest and the best."""
    return _step_folders(run_dir) + set_aside_in(run_dir) + _links_in(run_dir)


def remains_of(run_dir: Path) -> list[Path]:
    """What a killed run has left of checkpoints: folders without a manifest, and a link before it is renamed."""
    half = [folder for folder in _step_folders(run_dir) if not is_checkpoint(folder) and not folder.is_symlink()]
    return [folder for folder in half if own_files(folder) or not names_in(folder)] + _links_in(run_dir, PARTIAL)


def remove_remains(run_dir: Path) -> list[Path]:
    """Remove the remains of checkpoints, while no run is at work in `run_dir`.

    Returns the files that stay, since no run wrote them.
    """
    left = []
    for path in remains_of(run_dir):
        left += remove_remain(path)
    folder = run_dir / FOLDER
    if not checkpoints_of(run_dir):
        for link in _links_in(run_dir):
            link.unlink()
    with suppress(OSError):
        folder.rmdir()  # only where it is empty
    return left


def remove_remain(path: Path) -> list[Path]:
    """Remove one of `remains_of`. Returns the files that stay, since no run wrote them."""
    if path.is_dir() and not path.is_symlink():
        return remove(path)
    path.unlink(missing_ok=True)
    return []


def kept_back(paths: Sequence[Path]) -> str:
    """A line for the user about files that were not removed with checkpoints."""
    names = ", ".join(str(path) for path in paths[:8])
    return f"not removed, since zinf did not write it: {names}{', ...' if len(paths) > 8 else ''}"


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`, or the newest of the run at `path`. CheckpointError if there is none."""
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
    """The checkpoints to try, in this order, for checkpoint.resume ("auto", "never" or a path) of a run.

    With auto, older checkpoints follow the newest; a path is the only one. CheckpointError if it has no checkpoint.
    """
    if isinstance(resume, Path):
        return [find_checkpoint(resume)]
    return checkpoints_of(output_dir) if resume == "auto" else []


def begin(folder: Path) -> None:
    """Make a folder for a new checkpoint. An older one of the same name is removed first."""
    if folder.is_symlink() or folder.is_file():
        what = "link" if folder.is_symlink() else "file"
        raise CheckpointError(
            f"a {what}, where a checkpoint is to be written", where=str(folder), hint=f"rename the {what}"
        )
    remove(folder)
    folder.mkdir(parents=True, exist_ok=True)


def announce(folder: Path, names: Sequence[str]) -> None:
    """Note the names that a run is going to write into `folder`, to tell them from files of others."""
    write_durably(folder / UNFINISHED, json.dumps({"files": names}))


def commit(folder: Path, manifest: bytes) -> None:
    """Make the checkpoint exist, by its manifest. All else in `folder` is on the drive before."""
    write_durably(folder / MANIFEST, manifest)
    with suppress(OSError):
        (folder / UNFINISHED).unlink(missing_ok=True)
    for directory in (folder.parent, folder.parent.parent):
        sync_folder(directory)


def point_to(folder: Path, name: str) -> None:
    """Point one of LINKS to a checkpoint, unless a file or folder has that name (as in a copy of the run)."""
    link = folder.parent / name
    if os.path.lexists(link) and not _is_link(link):
        return
    partial = folder.parent / f"{name}{PARTIAL}"
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


def point_links(run_dir: Path) -> None:
    """Point the link `latest` to the newest checkpoint, and remove links whose checkpoints are gone."""
    for link in _links_in(run_dir):
        if not link.exists():
            link.unlink()
    for newest in checkpoints_of(run_dir)[:1]:
        point_to(newest, LATEST)


def set_damaged_aside(run_dir: Path, damaged: Sequence[Path]) -> None:
    """Rename damaged checkpoints, so that no run resumes from them, or keeps them instead of whole ones."""
    for folder in damaged:
        aside, number = folder.with_name(f"{_DAMAGED}{folder.name}"), 1
        while os.path.lexists(aside):
            number += 1
            aside = folder.with_name(f"{_DAMAGED}{folder.name}-{number}")
        folder.rename(aside)
        sync_folder(folder.parent)
    point_links(run_dir)


def keep_latest(newest: Path, count: int, best: Path | None = None) -> list[Path]:
    """Remove all but the `count` newest checkpoints up to `newest`, and `best`.

    Returns files that stay, since no run wrote them.

    Checkpoints after `newest` are left by an earlier life of the run, which could not read them. They do not count.
    """
    left = []
    run_dir = newest.parent.parent
    there = [folder for folder in checkpoints_of(run_dir) if step_of(folder) <= step_of(newest)]
    half = [folder for folder in remains_of(run_dir) if 0 <= step_of(folder) < step_of(newest)]  # could not be removed
    for folder in there[count:] + half:
        if folder != best:
            left += remove(folder)
    return left


def _links_in(run_dir: Path, ending: str = "") -> list[Path]:
    """The links to checkpoints that runs have made, of such names."""
    return [link for name in LINKS if _is_link(link := run_dir / FOLDER / f"{name}{ending}")]


def _is_link(path: Path) -> bool:
    """Whether `path` is a link that a run makes."""
    return path.is_symlink() and _STEP.fullmatch(Path(os.readlink(path)).name) is not None  # noqa: PTH115


def _step_folders(run_dir: Path) -> list[Path]:
    return _folders(run_dir, _STEP)


def _folders(run_dir: Path, named: re.Pattern[str]) -> list[Path]:
    """Folders in checkpoints/ with such names, and links to folders. A file with such a name is a user's."""
    paths = [run_dir / FOLDER / name for name in names_in(run_dir / FOLDER) if named.fullmatch(name)]
    return [path for path in paths if is_folder(path)]
