"""What the tape keeps of one call of a unit (tape.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from zinf_cli.engine.compute.activations import Parcel, Part, Saved
from zinf_cli.engine.compute.carriers import Carrier, parts_of
from zinf_cli.engine.compute.glue import Stretch
from zinf_cli.engine.compute.micro_batch import UnitCall
from zinf_cli.engine.compute.moving_state import Moment
from zinf_cli.engine.units.written_weights import storage_of
from zinf_cli.errors import ModelError


class RngState:
    """The CPU's and the device's random state."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Make this the random state again."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


@dataclass
class GlueTensor:
    """A differentiable tensor that enters units: one saved value, however many consumers."""

    edge: GradientEdge
    first: int
    """Number of the record that took it first, and so comes last in backward."""
    shape: torch.Size
    saved: Saved | None = None
    """The value, if a consumer of it is to be recomputed."""


@dataclass
class Graph:
    """A unit's forward with grad, ready for its backward."""

    inputs: list[tuple[GlueTensor, torch.Tensor]]
    outputs: list[GradientEdge | None]


@dataclass
class Record:
    """One call of a unit by one micro-batch."""

    number: int
    """Of its tape."""
    label: str
    call: UnitCall
    leaves: list[Any]
    """Flattened (args, kwargs). A glue tensor stands for each tensor with a gradient, a detached one for each other."""
    spec: pytree.TreeSpec
    rng: RngState
    moment: Moment | None = None
    """What the places of the model that move held before the call. The recompute needs it."""
    carriers: list[Carrier] = field(default_factory=list)
    """Objects that the leaves lead to, and what they held before the call, with tensors as in `leaves`."""
    emitted: GradientEdge | None = None
    """The last of its outputs in the glue; None if there is no output."""
    stretch: Stretch | None = None
    """The glue before it that nothing before it needs."""
    graph: Graph | None = None
    added: list[torch.Tensor] = field(default_factory=list)
    """Tensors that its forward has left in objects, until they enter the glue."""
    kept: list[Parcel] = field(default_factory=list)
    """Tensors that the graph needs on the device in backward."""
    before: list[Parcel] = field(default_factory=list)
    """Tensors that the glue between the record before and this one needs there."""
    before_again: list[Part] = field(default_factory=list)
    """The same, but sent by earlier glue, which needs them as well."""
    results: list[torch.Tensor] | None = None
    """Some values of the results of its forward, to compare with those of the recompute (recompute.py)."""
    versions: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    """The plain inputs, which are no copies, each with its count of changes before the call."""
    shared: list[tuple[Callable[[], int], int]] = field(default_factory=list)
    """For each output that shares memory with an input or with another output: what reads its count of changes, and the
    count after the call."""

    @cached_property
    def needs(self) -> Sequence[Saved]:
        """Tensors that its backward needs on the device. Asked for when all forwards are over."""
        between: list[Saved] = [*self.before, *self.before_again]
        if self.graph is not None:
            return [*self.kept, *between]
        return [*(glue.saved for glue in self.glue_inputs() if glue.saved is not None), *between]

    def glue_inputs(self) -> list[GlueTensor]:
        """The tensors with a gradient among the inputs, each of them once."""
        return list({id(leaf): leaf for leaf in self._taken() if isinstance(leaf, GlueTensor)}.values())

    def plain_inputs(self) -> list[torch.Tensor]:
        """The tensors without a gradient among the inputs."""
        return [leaf for leaf in self._taken() if isinstance(leaf, torch.Tensor)]

    def _taken(self) -> Iterator[Any]:
        yield from self.leaves
        for carrier in self.carriers:
            for value in carrier.held.values():
                yield from parts_of(value)

    def free_inputs(self) -> None:
        """Drop the values of the inputs: the graph does not need them, and an output may share their memory."""
        assert self.graph is not None
        for _, leaf in self.graph.inputs:
            leaf.data = leaf.new_empty(()).expand(leaf.shape)

    def check_plain_inputs(self) -> None:
        """ModelError if one was changed in place since the call, unless `moment` has what it was."""
        states = (state for held in (self.moment or {}).values() for state in held.states)
        restored = {storage_of(own) for own, _ in states if isinstance(own, torch.Tensor)}
        if any(tensor._version != version and storage_of(tensor) not in restored for tensor, version in self.versions):
            raise ModelError(
                f"an argument of {self.label} was changed in place after the call, so it can't be recomputed",
                hint="give it a copy, or keep its activations: activation_checkpointing=none",
            )

    def check_shared(self) -> None:
        """ModelError if tensors that share memory were changed in place: the graph of the other does not know of it."""
        if any(version_of() != version for version_of, version in self.shared):
            raise ModelError(
                "the model changes a layer's result in place, and another tensor shares its memory",
                hint="a layer that returns its input, or one tensor twice, has to return a copy",
            )

    def free(self) -> None:
        """Free the graph and what it saved."""
        self.graph = None
        for saved in self.kept:
            saved.free()

    def free_before(self) -> None:
        """Free what the glue before it saved. Backward goes towards earlier glue, which still needs `before_again`."""
        for saved in (*self.before, *self.before_again):
            saved.free()
