"""Backward of one product for several micro-batches at once.

A unit that is one product gets a gradient of its weight from each micro-batch. To make one and to add it up moves as
many bytes as four weights. Where a micro-batch has few tokens, that takes longer than the product itself. So the tokens
of several micro-batches are joined to one input. Backward is that of the unit's own forward: one product gives the
gradient of the weight, and one those of the inputs.

What is joined takes no more memory than a gradient of the weight, and the plan counts it (plan/memory.py). How many are
joined follows from shapes and from the micro-batches of a sweep, so losses have the same bits for every placement. In a
model with experts on demand nothing is joined: a cut mixture adds up as the whole one does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch.utils import _pytree as pytree

from zinf_cli.engine.compute.products import without_products
from zinf_cli.engine.compute.record import GlueTensor, Record
from zinf_cli.engine.compute.sweep_member import SweepMember
from zinf_cli.engine.compute.tape import Tape, autocast
from zinf_cli.engine.units.tiles import linear_rows
from zinf_cli.engine.units.units import UnitLayout


def in_turn(
    members: Sequence[SweepMember], number: int, unit: UnitLayout, experts: Collection[int]
) -> Iterator[list[Tape]]:
    """The tapes whose newest records are calls of the unit `number`, those together that get one backward.

    A tape comes again as long as its newest record is a call of the same one of the `experts`.
    """
    tapes = [member.tape for member in members if member.recorded == number]
    while tapes:
        count = 1 if experts else _joinable(tapes, unit)
        yield tapes[:count]
        if number not in experts or not tapes[0].records or tapes[0].records[-1].call.unit != number:
            tapes = tapes[count:]


def _joinable(tapes: Sequence[Tape], unit: UnitLayout) -> int:
    """How many of `tapes`, whose newest records are calls of `unit`, get one backward, from the first one on."""
    records = [tape.records[-1] for tape in tapes]
    matrices = [place.shape for place in unit.params() if len(place.shape) == 2]
    if len(matrices) != 1 or not all(map(_is_alone, records)) or len({_input(one).shape for one in records}) > 1:
        return 1
    rows, columns = matrices[0]
    tokens = _input(records[0]).shape.numel() // columns
    most = max(1, rows * columns // max(1, tokens * (2 * columns + rows)))
    return -(-len(tapes) // -(-len(tapes) // most))


def backward(tapes: Sequence[Tape]) -> None:
    """Run backward of the newest record of each of `tapes`: one of all, if they are several."""
    if len(tapes) == 1:
        tapes[0].backward(tapes[0].records[-1])
        return
    with tapes[0].in_backward():
        taken = [(tape, tape.take_output_grads()) for tape in tapes]
        given = [(tape, grad) for tape, (grad,) in taken if grad is not None]
        if given:
            _join(*zip(*given, strict=True))
    for tape in tapes:
        tape.leave()


def _join(tapes: Sequence[Tape], grads: Sequence[torch.Tensor]) -> None:
    records = [tape.records[-1] for tape in tapes]
    first = records[0]
    shape = _input(first).shape
    inputs = _joined(records).requires_grad_()
    args, kwargs = pytree.tree_unflatten(
        [inputs if isinstance(leaf, GlueTensor) else leaf for leaf in first.leaves], first.spec
    )
    with without_products(), autocast(first.call, inputs.device):
        result = first.call.forward(*args, **kwargs)
    torch.autograd.backward((result,), (torch.cat([grad.flatten(0, -2) for grad in grads]),))
    assert inputs.grad is not None
    for tape, record, grad in zip(tapes, records, inputs.grad.split(shape[:-1].numel()), strict=True):
        tape.add_input_grad(_input(record), grad.view(shape))


def _joined(records: Sequence[Record]) -> torch.Tensor:
    """The inputs of all records, one below the other."""
    joined: torch.Tensor | None = None
    for number, record in enumerate(records):
        saved = _input(record).saved
        assert saved is not None
        values = saved.get().flatten(0, -2)
        if joined is None:
            joined = values.new_empty(len(records) * len(values), *values.shape[1:])
        joined[number * len(values) : (number + 1) * len(values)] = values
        saved.evict()
    assert joined is not None
    return joined


def _input(record: Record) -> GlueTensor:
    return record.glue_inputs()[0]


def _is_alone(record: Record) -> bool:
    """Whether its result is a product with one tensor, and nothing else."""
    if not record.call.product or record.graph is not None or record.moment is not None or record.emitted is None:
        return False
    others = [leaf for leaf in record.leaves if not isinstance(leaf, GlueTensor)]
    is_tile = len(others) == 4 and others[0] is linear_rows and others[2:] == [None, None]
    return len(record.glue_inputs()) == 1 and (not others or is_tile) and len(_input(record).shape) > 1
