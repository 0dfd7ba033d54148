"""The places in zinf's source that order work: found by reading it, whether a test comes there or not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zinf_cli
from happens_before import PASSING_ON

_ROOT = Path(zinf_cli.__file__).parent
_ROOMS = ("tiers", "engine", "models", "batches", "train")
_METHODS = {"wait", "wait_event", "wait_stream", "synchronize", "record"}
"""Of transfers, streams and events."""
_FUNCTIONS = PASSING_ON | {"settle"}
"""What waits for its caller, and what such a function is called where it is given as an argument."""


@dataclass(frozen=True)
class Place:
    """A call that orders work."""

    function: str
    """Where it stands: "tiers/bounce.py Moment.read"."""
    call: str
    """What is called: "stream.wait_event"."""
    first_line: int
    last_line: int

    def __str__(self) -> str:
        return f"{self.function}: {self.call}"

    def covers(self, site: str) -> bool:
        """Whether a site of happens_before.py ("tiers/bounce.py:44 Moment.read") is this place."""
        where, line = site.split()[0].split(":")
        return where == self.function.split()[0] and self.first_line <= int(line) <= self.last_line


def places_of_waits() -> list[Place]:
    """Every call of zinf's source that waits for a transfer, a stream or an event, or records one."""
    files = [path for room in _ROOMS for path in sorted((_ROOT / room).rglob("*.py"))]
    return [place for path in files for place in _places(ast.parse(path.read_text()), str(path.relative_to(_ROOT)), ())]


def _places(node: ast.AST, file: str, inside: tuple[str, ...]) -> Iterator[Place]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        inside = (*inside, node.name)
    if isinstance(node, ast.Call) and _waits(node.func) and not (inside and inside[-1] in PASSING_ON):
        yield Place(f"{file} {'.'.join(inside)}", ast.unparse(node.func), node.lineno, node.end_lineno or node.lineno)
    for child in ast.iter_child_nodes(node):
        yield from _places(child, file, inside)


def _waits(called: ast.expr) -> bool:
    if isinstance(called, ast.Attribute):
        return called.attr in _METHODS or called.attr in PASSING_ON - {"time"}
    return isinstance(called, ast.Name) and called.id in _FUNCTIONS
