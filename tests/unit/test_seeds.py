"""Seeds are what their description says: a checkpoint may be resumed by another interpreter."""

from __future__ import annotations

import ast
from pathlib import Path

import zinf_cli
from zinf_cli.models.seeds import derived_seed


def test_seeds_are_the_documented_ones() -> None:
    assert derived_seed(0, 0, 0) == 2696329656458929524
    assert derived_seed(1234, 7, 3) == 8621766059896892738
    assert derived_seed(5, "model.layers.0") == 5927506515865154920


def test_nothing_rests_on_pythons_own_hash() -> None:
    for path in Path(zinf_cli.__file__).parent.rglob("*.py"):
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        assert not [name for name in calls if isinstance(name, ast.Name) and name.id == "hash"], path
