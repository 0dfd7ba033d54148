"""Modules that keep what can't change unseen are compared at once (held.py), and no change is missed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from zinf_cli.engine.compute.moving_state import MovingState


class Keeping(nn.Module):
    """A module as peft's are: containers, some of them nested, and one that all modules share."""

    def __init__(self, shared: list[str]) -> None:
        super().__init__()
        self.names = shared
        self.scaling = {"default": 2.0}
        self.settings: dict[str, Any] = {"device": {"": torch.device("cpu")}, "name": "q_proj"}
        self.merged: list[str] = []
        self.count = 0


CHANGES: dict[str, tuple[Callable[[Keeping], object], str]] = {
    "a value": (lambda one: setattr(one, "count", 1), "count"),
    "an item": (lambda one: one.scaling.update(default=3.0), "scaling"),
    "a nested item": (lambda one: one.settings["device"].update({"": torch.device("meta")}), "settings"),
    "a filled list": (lambda one: one.merged.append("default"), "merged"),
    "another list": (lambda one: setattr(one, "merged", ["default"]), "merged"),
    "a new attribute": (lambda one: setattr(one, "more", 1), "more"),
    "one less": (lambda one: delattr(one, "count"), "count"),
    "a buffer": (lambda one: one.register_buffer("mean", torch.zeros(1)), "mean"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_a_module_that_has_been_still_is_seen_and_put_back(change: str) -> None:
    shared = ["default"]
    model = nn.ModuleDict({name: Keeping(shared) for name in ("a", "b", "c")})
    state = MovingState(model)
    for _ in range(3):
        state.begin()
        state.look()
        assert not state.moved
    make, name = CHANGES[change]
    make(model["b"])  # type: ignore[arg-type]
    state.look()
    assert state.moved == {("b", name)}
    state.put_back()
    state.begin()
    state.look()
    assert not state.moved
    shared.append("other")
    state.look()
    assert state.moved == {("a", "names")}  # the first place that leads there
