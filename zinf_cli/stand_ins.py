"""Recognises files that only stand for another file: a pointer of Git LFS or git-annex, a page of HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_BEGIN_BYTES = 256
_LFS = re.compile(rb"version https://git-lfs\.github\.com/")
_ANNEX = re.compile(rb"[./\\]*(\.git)?[/\\]annex[/\\]objects[/\\]")
_PAGE = re.compile(rb"\s*<(!doctype html|html)\b", re.IGNORECASE)
_POINTERS = (
    (_LFS, "a pointer of Git LFS, not the file itself", "git lfs pull"),
    (_ANNEX, "a pointer of git-annex, not the file itself", "git annex get"),
)
_PAGES = ((_PAGE, "a page of HTML, as a failed download leaves it", "download it again"),)
LARGEST_POINTER = 1024
"""Bytes."""


def pointer(path: Path) -> tuple[str, str] | None:
    """(what it is, what to do) for a file that only stands for another one. None for any other file."""
    return _first(path, _POINTERS)


def stand_in(path: Path) -> tuple[str, str] | None:
    """The same, also for a page of HTML, for a file that should not be text."""
    return _first(path, _POINTERS + _PAGES)


def _first(path: Path, kinds: Sequence[tuple[re.Pattern[bytes], str, str]]) -> tuple[str, str] | None:
    with suppress(OSError), path.open("rb") as file:
        begin = file.read(_BEGIN_BYTES)
        return next(((what, hint) for pattern, what, hint in kinds if pattern.match(begin)), None)
    return None
