"""Finds and removes what a run wrote into a checkpoint's folder. All else in the folder is a user's, and stays."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

from zinf_cli.checkpoint.manifest import BUFFERS, FOLDERS, MANIFEST, REFERENCE, UNFINISHED
from zinf_cli.checkpoint.reading import names_in
from zinf_cli.durable import final_name, sync_folder

_NAMED = re.compile(
    "|".join((r"rank-\d{5,}\.safetensors", *map(re.escape, (BUFFERS, REFERENCE, MANIFEST, UNFINISHED))))
)


def own_files(folder: Path) -> list[Path]:
    """The files that a run wrote into `folder`: names that only a run gives, and those that its manifest lists."""
    listed = _listed(folder / MANIFEST) | _listed(folder / UNFINISHED)

    def is_own(name: str) -> bool:
        final = final_name(name)
        return final in listed or _NAMED.fullmatch(final) is not None

    within = [inner for inner in FOLDERS if not (folder / inner).is_symlink()]
    names = [*names_in(folder), *(f"{inner}/{name}" for inner in within for name in names_in(folder / inner))]
    paths = [folder / name for name in names if is_own(name)]
    return [path for path in paths if path.is_symlink() or not path.is_dir()]


def remove(folder: Path) -> list[Path]:
    """Remove a checkpoint, or what is left of one. Returns the files that stay in its folder, since no run wrote them.

    The manifest is renamed first, since without it there is no checkpoint. Under its other name it stays as long as
    files that it lists exist. A link or a file is a user's: neither it, nor what it leads to, is touched.
    """
    if folder.is_symlink() or folder.is_file():
        return []
    own = own_files(folder)
    manifest, unfinished = folder / MANIFEST, folder / UNFINISHED
    if manifest in own:
        manifest.replace(unfinished)
        sync_folder(folder)
    for path in own:
        if path not in (manifest, unfinished):
            path.unlink(missing_ok=True)
    unfinished.unlink(missing_ok=True)
    for inner in FOLDERS:
        with suppress(OSError):
            (folder / inner).rmdir()  # only where it is empty
    left = [folder / name for name in names_in(folder)]
    if not left:
        with suppress(FileNotFoundError):
            folder.rmdir()
    return left


def _listed(manifest: Path) -> set[str]:
    """The files that a manifest lists, even if its checksum is wrong."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return set(json.loads(manifest.read_bytes())["files"])
    return set()
