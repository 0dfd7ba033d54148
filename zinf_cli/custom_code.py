"""Refuses what needs the Python files of a checkpoint, since these are never run."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from zinf_cli.errors import ZinfError

_Error = TypeVar("_Error", bound=ZinfError)


def names_custom_code(directory: Path, name: str) -> bool:
    """Whether the JSON file names classes in Python files beside it (`auto_map`)."""
    with suppress(OSError, ValueError, RecursionError):
        document = json.loads((directory / name).read_bytes())
        return isinstance(document, dict) and bool(document.get("auto_map"))
    return False


def custom_code_refused(directory: Path, name: str, kind: type[_Error]) -> _Error:
    return kind(
        f"{name} names code of its own (auto_map), which zinf does not run",
        where=str(directory),
        hint="use a version of this checkpoint that transformers knows without trust_remote_code",
    )
