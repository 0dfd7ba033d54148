"""The checkpoints of a run: where they lie, which are there, which is the newest; and how one appears and goes.

A checkpoint exists when its manifest does. The manifest is written beside its name, synced and renamed when everything
else is on the drive, and it is the first thing to go when a checkpoint is removed. So a crash at any moment leaves
whole checkpoints, and folders without a manifest, which are nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from zinf_cli.durable import PARTIAL, sync_folder, write_durably
from zinf_cli.errors import CheckpointError

FOLDER, LATEST, MANIFEST = "checkpoints", "latest", "manifest.json"
DAMAGED = "damaged-"
_STEP = re.compile(r"step-(\d{8,})")


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step a checkpoint's folder is named by; -1 where it is not named so."""
    named = _STEP.fullmatch(folder.name)
    return int(named[1]) if named else -1


def is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    return sorted(filter(is_checkpoint, _step_folders(run_dir)), key=step_of, reverse=True)


def remains_of(run_dir: Path) -> list[Path]:
    """What a killed run left of checkpoints: folders without a manifest, names that were to be renamed."""
    half = [folder for folder in _step_folders(run_dir) if not is_checkpoint(folder)]
    return half + sorted((run_dir / FOLDER).glob(f"**/*{PARTIAL}"))


def remove_remains(run_dir: Path) -> None:
    """Remove what is nothing; no run is at work in `run_dir`."""
    for path in remains_of(run_dir):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if not checkpoints_of(run_dir) and (run_dir / FOLDER).exists():
        shutil.rmtree(run_dir / FOLDER)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of the run in it; CheckpointError where there is none."""
    if is_checkpoint(path):
        return path.resolve()
    found = checkpoints_of(path)
    if found:
        return found[0]
    if not path.exists():
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
    """An empty folder for a new checkpoint; one of the same name is removed first."""
    remove(folder)
    folder.mkdir(parents=True)


def commit(folder: Path, manifest: bytes) -> None:
    """Make the checkpoint exist: everything else in `folder` is on the drive."""
    write_durably(folder / MANIFEST, manifest)
    for directory in (folder.parent, folder.parent.parent):
        sync_folder(directory)
    point_latest(folder.parent.parent)


def point_latest(run_dir: Path) -> None:
    """Let the link `latest` lead to the newest checkpoint, unless a copy of the run has a folder in its place."""
    newest, link = checkpoints_of(run_dir)[:1], run_dir / FOLDER / LATEST
    if newest and (link.is_symlink() or not link.exists()):
        partial = link.with_name(f"{LATEST}{PARTIAL}")
        partial.unlink(missing_ok=True)
        partial.symlink_to(newest[0].name)
        partial.rename(link)
        sync_folder(link.parent)


def set_damaged_aside(run_dir: Path, damaged: Sequence[Path]) -> None:
    """Rename checkpoints that are not whole, so that they are neither resumed from nor kept instead of whole ones."""
    for folder in damaged:
        aside = folder.with_name(f"{DAMAGED}{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        sync_folder(folder.parent)
    point_latest(run_dir)


def keep_latest(run_dir: Path, count: int) -> None:
    """Remove all but the `count` newest checkpoints."""
    for folder in checkpoints_of(run_dir)[count:]:
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint, or what is left of one; its manifest goes first."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        sync_folder(folder)
        shutil.rmtree(folder)


def _step_folders(run_dir: Path) -> Sequence[Path]:
    return sorted(path for path in (run_dir / FOLDER).glob("step-*") if step_of(path) >= 0)
