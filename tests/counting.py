"""Code that models of tests reach by name (test_spaces.py): it counts its calls in a variable of this module."""

from __future__ import annotations

CALLS = [0]


def bump() -> int:
    return _add()


def _add() -> int:
    CALLS[0] += 1
    return CALLS[0]
