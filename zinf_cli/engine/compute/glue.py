"""The autograd graph of the glue: what a micro-batch's forward computes between units.

Glue is cut into stretches. A record's stretch is all that leads to its inputs, and to no input of an earlier record.
What adds to a gradient in a stretch is its own record, a later record, or the stretch of a later record. So when
backward of a record is done, its stretch is ready and runs. Each node of the glue is in one stretch, so it runs once.

A run of autograd over a stretch stops at its ends: older stretches, results of units, weights. What comes to an end is
held there, and is the first summand of the next run that comes there. So gradients are added up in plain PyTorch's
order, the newest first, one after another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node

_Place = tuple[int, int]
"""Where a gradient comes to: the `id` of a node, and which of its results the gradient is of."""


class Emit(torch.autograd.Function):
    """Outputs of a unit enter the glue. Backward of the glue ends here, so this has none."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, outputs: list[torch.Tensor]) -> Any:
        return tuple(outputs)


_EMIT = Emit._backward_cls
_WEIGHT = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
_ENDS = (_EMIT, _WEIGHT)


def is_emit(node: Node) -> bool:
    """Whether the node stands for a call of a unit."""
    return isinstance(node, _EMIT)


@dataclass
class Stretch:
    """The glue that runs backward when that of its record is done."""

    nodes: list[Node]
    ends: list[GradientEdge]
    """Where its edges lead out of it."""
    stops: list[Node]
    """Nodes at its ends that may lead to another end. So autograd goes on through them, unless they are barred."""


class GlueGraph:
    """The graph of one micro-batch's glue, and the gradients that have come to it."""

    def __init__(self) -> None:
        self._count = 0
        self._stretch_of: dict[int, int] = {}
        """The first stretch that a node is in, or ends at. By the `id` of the node, which the stretch keeps alive."""
        self._held: dict[_Place, tuple[GradientEdge, torch.Tensor]] = {}

    def stretch(self, edges: Iterable[GradientEdge]) -> Stretch:
        """The glue that leads to `edges`, which a unit takes now or the loss is, as far as it is in no stretch yet."""
        nodes: list[Node] = []
        out: list[tuple[Node | None, int]] = []
        ahead: list[Node | None] = [edge.node for edge in edges]
        while ahead:
            node = ahead.pop()
            if node is None or id(node) in self._stretch_of:
                continue
            self._stretch_of[id(node)] = self._count
            if not isinstance(node, _ENDS):
                nodes.append(node)
                out += node.next_functions
                ahead += [before for before, _ in node.next_functions]
        inside = set(map(id, nodes))
        ends = {(id(node), n): GradientEdge(node, n) for node, n in out if node is not None and id(node) not in inside}
        self._count += 1
        return Stretch(nodes, list(ends.values()), self._stops({edge.node for edge in ends.values()}))

    def _stops(self, ends: set[Node]) -> list[Node]:
        """See `Stretch.stops`. Glue leads to no newer stretch: an end that is older than all others leads to none."""
        numbers = {node: self._stretch_of[id(node)] for node in ends}
        oldest = [node for node in ends if numbers[node] == min(numbers.values())]
        return [node for node in ends if not isinstance(node, _ENDS) and oldest != [node]]

    def add(self, edge: GradientEdge, grad: torch.Tensor | None) -> None:
        """Add to the gradient at `edge` what one use gives, if it gives something. A weight gets it at once."""
        if grad is None:
            return
        if isinstance(edge.node, _WEIGHT):
            _give(edge.node, grad)
        else:
            place = _place(edge)
            before = self._held.get(place)
            self._held[place] = (edge, grad if before is None else before[1] + grad)

    def take(self, node: Node, outputs: int) -> list[torch.Tensor | None]:
        """The gradients of the results of a unit's call. No more comes to them."""
        held = [self._held.pop((id(node), number), None) for number in range(outputs)]
        return [None if one is None else one[1] for one in held]

    def finish(self) -> None:
        """All has run backward."""
        assert not self._held, f"gradients that nothing took: {[edge.node for edge, _ in self._held.values()]}"

    def run(self, stretch: Stretch) -> None:
        """Run backward of a stretch that is ready. Weights at its ends get their gradient at once."""
        inside = set(map(id, stretch.nodes))
        ready = [place for place in self._held if place[0] in inside]
        if not ready:
            return
        held = [place for place in map(_place, stretch.ends) if place in self._held]
        edges, grads = zip(*[self._held.pop(place) for place in (*held, *ready)], strict=True)
        barred = [node.register_prehook(lambda grads: (None,) * len(grads)) for node in stretch.stops]
        found = torch.autograd.grad(edges, stretch.ends, grads, allow_unused=True, retain_graph=bool(barred))
        for bar in barred:
            bar.remove()
        for end, grad in zip(stretch.ends, found, strict=True):
            if grad is None:
                continue
            if isinstance(end.node, _WEIGHT):
                _give(end.node, grad)
            else:
                self._held[_place(end)] = (end, grad)


def _give(weight: Any, grad: torch.Tensor) -> None:
    """Let a weight's node add to its gradient."""
    with torch.no_grad():
        weight(grad)


def _place(edge: GradientEdge) -> _Place:
    return id(edge.node), edge.output_nr
