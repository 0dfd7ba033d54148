"""`python -m zinf_cli.launch.facts`: tells what a host has, as one JSON document. stdin tells what to look at, as JSON.

It runs on every host before anything else, so it imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zinf_cli.errors import PreflightError
from zinf_cli.machine.control_groups import cores_here
from zinf_cli.machine.hardware import accelerators_here, available_memory, drive_space, huge_pages
from zinf_cli.machine.nodes import nodes_of_accelerators, nodes_of_drive
from zinf_cli.version import code_digest, version_of


def facts(paths: Sequence[str], nvme: Sequence[str]) -> dict[str, Any]:
    """Versions, accelerators, cores, CPU memory in bytes, drives, NUMA nodes, the files at `paths`, and the time."""
    return {
        "code": code_digest(),
        "torch": version_of("torch") or "of unknown version",
        "accelerators": accelerators_here(),
        "cores": cores_here(),
        "memory": available_memory(),
        "drives": {folder: _drive(Path(folder)) for folder in nvme},
        "nodes": {
            "accelerators": sorted(nodes_of_accelerators()),
            "drives": sorted(set().union(*(nodes_of_drive(Path(folder)) for folder in nvme))),
        },
        "paths": {path: _contents(Path(path)) for path in paths},
        "huge_pages": huge_pages(),
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "time": time.time(),
    }


def _drive(folder: Path) -> dict[str, Any]:
    """What a folder can hold. If nothing can be written there, "problem" has the fields of the error (errors.py)."""
    try:
        return {**asdict(drive_space(folder)), "problem": None}
    except PreflightError as error:
        return {"problem": error.to_json()}
    except OSError as error:
        return {"problem": PreflightError(f"can't look at it: {error.strerror}", where=str(folder)).to_json()}


def _contents(path: Path) -> str | None:
    """A digest of the names and sizes of files below `path`, and of the text of config.json. None without a `path`."""
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        if file.name == "config.json":
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    yield from sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


if __name__ == "__main__":
    print(json.dumps(facts(**json.load(sys.stdin))))
