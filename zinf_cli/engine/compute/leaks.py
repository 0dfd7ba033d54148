"""Tensors with a gradient that go past the arguments and results of a unit: in a list that all layers know, a global, a
context variable, a closure.

The tape gives a unit detached arguments and takes its results; a tensor that goes another way has no gradient in the
forward, and another micro-batch's in the recompute. In the survey every tensor that takes part in a gradient goes
through a door when it enters a call of a unit and when it leaves one. So in the graph of the loss, an edge from the
nodes of a call to any others that does not pass a door is such a way. What the loss does not depend on (a statistic
without a gradient, what is kept to be looked at) may go any way it likes.

A model that no survey has seen to its end is looked at in its first step: what it makes between units of their results
leads to these and to resident weights alone. What one layer takes from another is not seen there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from zinf_cli.errors import ModelError

_Node = torch.autograd.graph.Node
_HINT = "a layer that returns it, or puts it into an argument, can be trained; so can one that detaches it"


class _Door(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0]


def through_door(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor on the other side, with a node of its own in the graph."""
    passed: torch.Tensor = _Door.apply(tensor)  # type: ignore[no-untyped-call]
    return passed


class Calls:
    """Which nodes of the autograd graph the calls of units have made: autograd numbers them as they come."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._units: list[str] = []

    @contextmanager
    def of(self, unit: str) -> Iterator[None]:
        """For the time of a call; the doors into it are its own, those out of it are not."""
        start = torch._C._autograd._get_sequence_nr()
        yield
        self._starts.append(start)
        self._ends.append(torch._C._autograd._get_sequence_nr())
        self._units.append(unit)

    def check(self, loss: torch.Tensor) -> None:
        """ModelError where the graph of `loss` goes into a call, or out of it, past the doors."""
        ahead = [loss.grad_fn] if loss.grad_fn is not None else []
        seen = {*ahead}
        while ahead:
            node = ahead.pop()
            for before, _ in node.next_functions:
                if before is None or hasattr(before, "variable"):  # a weight is at home everywhere
                    continue
                if getattr(node, "_forward_cls", None) is not _Door and self._number(node) != self._number(before):
                    raise self._leak(node, before)
                if before not in seen:
                    seen.add(before)
                    ahead.append(before)

    def _number(self, node: _Node) -> int | None:
        """Of the call that has made it; None between calls."""
        made = node._sequence_nr()
        number = bisect_right(self._starts, made) - 1
        return number if number >= 0 and made < self._ends[number] else None

    def _leak(self, node: _Node, before: _Node) -> ModelError:
        user, maker = self._number(node), self._number(before)
        taker = "the model" if user is None else self._units[user]
        if maker is None:
            return ModelError(
                f"{taker} takes the result of {_operation(before)} between the layers from somewhere else than its "
                f"arguments, and goes on with it in {_operation(node)}",
                hint="a layer that gets it as an argument can be trained",
            )
        return ModelError(
            f"{self._units[maker]} leaves the result of {_operation(before)} somewhere else than in its arguments or "
            f"return values, and {taker} goes on with it there in {_operation(node)}: its gradient would be lost",
            hint=_HINT,
        )


def check_between(ends: Iterable[_Node | None], at_home: Sequence[torch.Tensor]) -> None:
    """ModelError where the graph between units, from its `ends` back to what the tape emits, leads into a unit.

    `at_home` are the weights that may be used there.
    """
    known = {id(weight) for weight in at_home}
    ahead = [end for end in ends if end is not None]
    seen = {*ahead}
    while ahead:
        node = ahead.pop()
        if hasattr(node, "record"):  # see tape.Emit
            continue
        if hasattr(node, "variable") and id(node.variable) not in known:
            raise ModelError(
                "a layer leaves a tensor somewhere else than in its arguments or return values, and the model's loss "
                "depends on it there: its gradient would be lost",
                hint=_HINT,
            )
        new = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= new
        ahead += new


def _operation(node: _Node) -> str:
    """`add` of AddBackward0."""
    return node.name().partition("Backward")[0].lower()
