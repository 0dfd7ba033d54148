"""Finds leaks: tensors with a gradient that enter or leave a unit beside its arguments and results.

A leak goes through a list that all layers know, a global, a context variable or a closure. The tape gives a unit
detached arguments and takes its results. A tensor that leaks has no gradient in the forward; in the recompute, the one
that is found there is another micro-batch's.

In the survey, every tensor with a gradient passes a door when it enters a call of a unit, and again when it leaves the
call. So a leak is an edge in the graph of the loss that joins nodes of a call with other nodes and passes no door.
Tensors that the loss does not depend on may go any way: statistics without a gradient, values to look at.

A survey sees one way through the model. A leak on another way leaves its tensor at a place that moves
(moving_state.py), or in a context variable. So steps in which places move are checked, steps of models that name a
context variable, and the first step of a model whose survey came to no end. In such a step forward makes the graph of
each call, which costs no memory that backward does not need, and drops it. The graph of a call may lead only to what it
was given and to weights; the graph between units, only to results of units and to resident weights.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from zinf_cli.engine.compute.glue import is_emit
from zinf_cli.engine.compute.record import Record
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
    """The tensor behind a door: the same values, with a node of the door in the graph."""
    passed: torch.Tensor = _Door.apply(tensor)  # type: ignore[no-untyped-call]
    return passed


class Calls:
    """Knows which call of a unit has made a node of the autograd graph: autograd numbers nodes as they are made."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._units: list[str] = []

    @contextmanager
    def of(self, unit: str) -> Iterator[None]:
        """A context for one call. The doors into the call are made inside it, the doors out of it after it."""
        start = torch._C._autograd._get_sequence_nr()
        yield
        self._starts.append(start)
        self._ends.append(torch._C._autograd._get_sequence_nr())
        self._units.append(unit)

    def check(self, loss: torch.Tensor) -> None:
        """ModelError where the graph of `loss` enters or leaves a call without a door."""
        ahead = [loss.grad_fn] if loss.grad_fn is not None else []
        seen = {*ahead}
        while ahead:
            node = ahead.pop()
            for before, _ in node.next_functions:
                if before is None or hasattr(before, "variable"):  # a weight may be used anywhere
                    continue
                if getattr(node, "_forward_cls", None) is not _Door and self._number(node) != self._number(before):
                    raise self._leak(node, before)
                if before not in seen:
                    seen.add(before)
                    ahead.append(before)

    def _number(self, node: _Node) -> int | None:
        """The number of the call that has made `node`; None if it was made between calls."""
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
    """ModelError where the graph between units leads into a unit.

    The walk goes from `ends` back to the nodes of the tape (glue.Emit). `at_home` are the weights that may be used
    between units.
    """
    known = {id(weight) for weight in at_home}
    ahead = [end for end in ends if end is not None]
    seen = {*ahead}
    while ahead:
        node = ahead.pop()
        if is_emit(node):
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


def check_call(record: Record, weights: Sequence[torch.Tensor]) -> None:
    """ModelError where the graph of a call leads to something else than its arguments and `weights`."""
    assert record.graph is not None
    known = {id(weight) for weight in weights} | {id(leaf) for _, leaf in record.graph.inputs}
    ahead = list({edge.node for edge in record.graph.outputs if edge is not None})
    seen = {*ahead}
    while ahead:
        node = ahead.pop()
        if hasattr(node, "variable"):
            leaf = node.variable
            strange = id(leaf) not in known and (isinstance(leaf, torch.nn.Parameter) or hasattr(leaf, "given_to"))
        else:
            strange = is_emit(node)
        if strange:
            raise ModelError(
                f"{record.label} goes on with a tensor that it takes from somewhere else than its arguments: its "
                "gradient would be lost",
                hint="a layer that gets it as an argument can be trained",
            )
        new = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= new
        ahead += new


def _operation(node: _Node) -> str:
    """The name of an operation: "add" for AddBackward0."""
    return node.name().partition("Backward")[0].lower()
