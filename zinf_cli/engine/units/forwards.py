"""Forwards of modules that the engine puts in place of their own, and how they are put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Have calls of `module` run `forward`; returns the call that undoes it. Of several, undo the last one first."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before

    return undo
