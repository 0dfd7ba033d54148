"""The unit tape: activation checkpointing per unit, for models that know nothing of it.

Forward runs each unit without autograd and records its inputs and the RNG state. The unit's outputs become outputs of
`Emit`, an autograd function that saves nothing. Autograd handles the glue, which is what the model computes between
units. Backward walks the records in reverse. At each record it runs the unit again with grad on detached inputs, runs
backward with the gradients that have come to its Emit, and hands the gradients of the inputs to the glue. Then the glue
runs backward as far as its gradients are complete (glue.py).

The autograd graph of a unit ends with the visit that binds its parameters. Only the graphs of units whose activations
are kept (keep.py) live on until backward: they hold no parameter, and need no recompute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from zinf_cli.engine.compute.activations import Activations, Parcel, Part
from zinf_cli.engine.compute.carriers import Reach, differentiable, opened
from zinf_cli.engine.compute.glue import Emit, GlueGraph
from zinf_cli.engine.compute.keep import GlueKeeper, Keeper
from zinf_cli.engine.compute.micro_batch import UnitCall
from zinf_cli.engine.compute.moving_state import MovingState
from zinf_cli.engine.compute.products import without_products
from zinf_cli.engine.compute.recompute import compare, differs, some_of
from zinf_cli.engine.compute.record import GlueTensor, Graph, Record, RngState
from zinf_cli.engine.compute.spared import Spared
from zinf_cli.engine.units.chunked_loss import backward_follows
from zinf_cli.engine.units.written_weights import storage_of
from zinf_cli.errors import ModelError
from zinf_cli.trace import Trace


class Tape:
    """The records of one micro-batch, newest last. With `compare`, recomputes are compared with their forward."""

    def __init__(
        self,
        device: torch.device,
        activations: Activations,
        state: MovingState,
        spared: Spared,
        *,
        trainable: set[int],
        staying: frozenset[int] = frozenset(),
        compare: bool = False,
        glue: GlueKeeper | None = None,
        trace: Trace | None = None,
        scale: float = 1.0,
    ) -> None:
        """`glue` packs what the code between units saves, in the micro-batch's thread. Of the units `staying`, inputs
        and what is saved before them stay in memory.

        `scale` is what the micro-batch's loss is multiplied by for its backward.
        """
        self._device = device
        self._activations = activations
        self._state = state
        self._trainable, self._staying = trainable, staying
        self.compares = compare
        self._scale, self._spared = scale, spared
        self._trace = trace or Trace()
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._taken: dict[tuple[int, int], GlueTensor] = {}
        self._graph = GlueGraph()
        self.glue = glue
        self._between: tuple[list[Parcel], list[Part]] = ([], [])
        """What the glue has saved since the last record, and what earlier glue has saved that it needs as well."""
        self.records: list[Record] = []

    def forward(self, call: UnitCall, label: str, *, hot: bool = False, keeper: Keeper | None = None) -> Any:
        """Run a unit's call and return what the model gets. ModelError where the unit changes its input in place.

        `hot` keeps the graph for a backward in the same visit. With `keeper` the graph is packed for a later visit.
        """
        flat, spec = opened(call.args, call.kwargs)
        reach = Reach(flat)
        tensors = [leaf for leaf in (*flat, *reach.tensors) if isinstance(leaf, torch.Tensor)]
        needs_grad = call.grad_enabled and (call.unit in self._trainable or any(t.requires_grad for t in tensors))
        if not needs_grad:
            with torch.no_grad(), autocast(call, self._device):
                return call.forward(*call.args, **call.kwargs)
        record = Record(len(self.records), label, call, [], spec, RngState(self._device))
        (record.before, record.before_again), self._between = self._between, ([], [])
        if self._state.moving:
            moment = self._state.moment()
            record.moment = moment if keeper is None else None
        versions = [tensor._version for tensor in tensors]
        recompute = not hot and keeper is None
        taken = {id(tensor): self._take(tensor, record, save=recompute) for tensor in tensors}
        record.leaves = [taken.get(id(leaf), leaf) for leaf in flat]
        record.carriers = [carrier.with_each(lambda value: taken.get(id(value), value)) for carrier in reach.carriers]
        record.versions = [(tensor, tensor._version) for tensor in record.plain_inputs()]
        record.stretch = self._graph.stretch(glue.edge for glue in record.glue_inputs() if glue.first == record.number)
        call.args, call.kwargs = (), {}
        self.records.append(record)
        values = {id(taken[id(tensor)]): tensor for tensor in tensors}
        outputs, left, given = self._run_once(record, values, keeper, grad=not recompute)
        for tensor, version in zip(tensors, versions, strict=True):
            if tensor._version != version:
                raise ModelError(f"unit {label} changes its input in place, so it can't be recomputed")
        if recompute and self.compares and not call.product:
            record.results = some_of(_results(outputs, record))
        emitted = self._emit(record, outputs, left, {id(given[key]): values[key] for key in given})
        record.shared = _shared_storage(tensors, emitted)
        if keeper is not None:
            record.free_inputs()
        return emitted

    def send_glue(self, unit: int) -> None:
        """Send what the glue has saved to its tier. Called while the micro-batch waits at `unit`."""
        if self.glue is None:
            return
        sent, again = self._between
        again += self.glue.take_again()
        if unit in self._staying:
            self.glue.keep()
        else:
            sent += self.glue.send()

    def loss_backward(self, loss: torch.Tensor) -> None:
        """Run backward from the loss through the glue after the last record."""
        edge = torch.autograd.graph.get_gradient_edge(loss)
        stretch = self._graph.stretch([edge])
        self._graph.add(edge, torch.full_like(loss, self._scale))
        self._graph.run(stretch)

    def backward(self, record: Record) -> None:
        """Run backward of the newest record, into p.grad of the bound unit and into the glue before it."""
        assert record is self.records[-1]
        with self.in_backward():
            self._unit_backward(record)
        self.leave()

    def in_backward(self) -> AbstractContextManager[None]:
        """A context for backward of the newest record."""
        return self._trace.span("compute", f"{self.records[-1].label} backward")

    def take_output_grads(self) -> list[torch.Tensor | None]:
        """The gradients that have come to the results of the newest record."""
        record = self.records[-1]
        record.check_shared()
        return [] if record.emitted is None else self._graph.take(record.emitted.node, record.emitted.output_nr + 1)

    def add_input_grad(self, glue: GlueTensor, grad: torch.Tensor | None) -> None:
        """Hand a gradient of one of its inputs to the glue."""
        self._graph.add(glue.edge, grad)

    def leave(self) -> None:
        """Free the newest record, whose backward is done, and run backward of the glue before it."""
        record = self.records.pop()
        record.free()
        with self._trace.span("glue", f"before {record.label}, backward"):
            self._backward_before(record)
        if not self.records:
            self._graph.finish()

    def _unit_backward(self, record: Record) -> None:
        grads = self.take_output_grads()
        if any(grad is not None for grad in grads):
            if record.graph is None:
                self._recompute(record)
            assert record.graph is not None
            for saved in record.kept:
                saved.get()
            pairs = [
                (edge, grad)
                for edge, grad in zip(record.graph.outputs, grads, strict=True)
                if grad is not None and edge is not None
            ]
            if pairs:
                torch.autograd.backward([edge for edge, _ in pairs], [grad for _, grad in pairs])
            del pairs, grads
            for glue, leaf in record.graph.inputs:
                self.add_input_grad(glue, leaf.grad)

    def _backward_before(self, record: Record) -> None:
        """Backward of the glue that is complete now that of `record` is, up to the record before."""
        for part in (*record.before, *record.before_again):
            part.hold()
        if record.stretch is not None:
            self._graph.run(record.stretch)
        for glue in record.glue_inputs():
            if glue.saved is None:
                continue
            if glue.first == record.number:
                glue.saved.free()
            else:
                glue.saved.evict()
        record.free_before()

    def prefetch(self) -> bool:
        """Start to bring back what the newest record needs. False if there is no room."""
        return not self.records or all(saved.prefetch() for saved in self.records[-1].needs)

    def cool(self, label: str) -> None:
        """Drop the graph of a hot forward. The unit was not the last, so backward recomputes it."""
        record = self.records[-1]
        assert record.graph is not None
        for glue, leaf in record.graph.inputs:
            glue.saved = glue.saved or self._activations.save(leaf.detach(), label)
        record.graph = None

    def close(self) -> None:
        """Free everything, after a sweep was given up."""
        for glue in self._taken.values():
            if glue.saved is not None:
                glue.saved.free()
        for record in self.records:
            record.free()
            record.free_before()
        for saved in self._between[0]:
            saved.free()
        self._between = ([], [])
        self._taken.clear()
        self._graph = GlueGraph()
        self.records.clear()

    def _take(self, tensor: torch.Tensor, record: Record, *, save: bool) -> GlueTensor | torch.Tensor:
        """What a record keeps of one tensor that it is given."""
        if not tensor.requires_grad:
            return tensor.detach()
        edge = torch.autograd.graph.get_gradient_edge(tensor)
        key = (id(edge.node), edge.output_nr)
        glue = self._taken.setdefault(key, GlueTensor(edge, record.number, tensor.shape))
        if save and glue.saved is None:
            stays = record.call.unit in self._staying
            glue.saved = self._activations.save(tensor.detach(), record.label, stays=stays)
        return glue

    def _recompute(self, record: Record) -> None:
        """Run the unit's forward again, with grad, from the random state and the places (moving_state.py) it had."""
        record.check_plain_inputs()
        now = self._state.moment() if record.moment is not None else {}
        self._state.go_to(record.moment or {})
        record.rng.restore()
        values = {}
        for glue in record.glue_inputs():
            assert glue.saved is not None
            values[id(glue)] = glue.saved.get()
        found = Reach([leaf for leaf in record.leaves if not isinstance(leaf, GlueTensor)])
        try:
            with self._left_out(record), backward_follows(self._scale, results_wanted=record.results is not None):
                outputs, _, _ = self._run(record, values)
        except StopIteration as error:  # the forward has used up an iterator that is an argument
            raise differs(record.label) from error
        if record.results is not None:
            compare(record.label, record.results, some_of(_results(outputs, record)))
        found.put()
        self._state.go_to(now)

    def _left_out(self, record: Record) -> AbstractContextManager[Any]:
        """A context for a recompute, which leaves out what nobody reads."""
        if record.call.product:
            return without_products()
        return self._spared.recompute() if record.results is None else nullcontext()

    def _run_once(
        self, record: Record, values: dict[int, torch.Tensor], keeper: Keeper | None, *, grad: bool
    ) -> tuple[Any, Reach, dict[int, torch.Tensor]]:
        """Run the unit's forward on the arguments themselves. With a `keeper`, its graph holds no device memory."""
        if keeper is None:
            with backward_follows(self._scale) if grad else nullcontext():
                return self._run(record, values, grad=grad)
        keeper.add_present(record.plain_inputs())
        with keeper.packing():
            done = self._run(record, values)
        record.kept = keeper.send()
        return done

    def _run(
        self, record: Record, values: dict[int, torch.Tensor], *, grad: bool = True
    ) -> tuple[Any, Reach, dict[int, torch.Tensor]]:
        """Run forward on detached inputs: `values`, by id of their glue tensor. With `grad`, set the record's graph.

        Returns the outputs, what the objects among the arguments hold now, and for each input, by the id of what the
        record keeps of it, the tensor that was passed.
        """
        inputs = [(glue, values[id(glue)].detach().requires_grad_(grad)) for glue in record.glue_inputs()]
        given = {id(glue): leaf for glue, leaf in inputs}
        for leaf in given.values():
            leaf.given_to = record.label  # type: ignore[attr-defined]  # see leaks.check_call
        for carrier in record.carriers:
            carrier.with_each(lambda value: given.get(id(value), value)).put()
        leaves = [given.get(id(leaf), leaf) for leaf in record.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, record.spec)
        before = Reach(leaves)
        with torch.set_grad_enabled(grad), autocast(record.call, self._device):
            outputs = record.call.forward(*args, **kwargs)
        left = before.after(outputs)
        record.added = left.added_since(before)
        if grad:
            edges = [
                torch.autograd.graph.get_gradient_edge(leaf) if leaf.requires_grad else None
                for leaf in _results(outputs, record)
            ]
            record.graph = Graph(inputs, edges)
        return outputs, left, {**given, **{id(leaf): leaf for leaf in record.plain_inputs()}}

    def _emit(self, record: Record, outputs: Any, left: Reach, back: dict[int, torch.Tensor]) -> Any:
        """Pass outputs, and tensors that the call has left in objects, through Emit.

        In objects, put inputs back: `back` has an input by the id of what was passed for it.
        """
        flat, spec = pytree.tree_flatten(outputs)
        places = [place for place, leaf in enumerate(flat) if differentiable(leaf)]
        emitted: tuple[torch.Tensor, ...] = Emit.apply(  # type: ignore[no-untyped-call]
            self._anchor, [tensor.detach() for tensor in (*(flat[place] for place in places), *record.added)]
        )
        if emitted:
            record.emitted = torch.autograd.graph.get_gradient_edge(emitted[-1])
        for place, tensor in zip(places, emitted, strict=False):
            flat[place] = tensor
        entered = {id(tensor): new for tensor, new in zip(record.added, emitted[len(places) :], strict=True)}
        left.put(lambda value: entered.get(id(value), back.get(id(value), value)))
        record.added = []
        return pytree.tree_unflatten(flat, spec)


def _results(outputs: Any, record: Record) -> list[torch.Tensor]:
    """The differentiable tensors that a call returns, and those that it leaves in objects."""
    return [*filter(differentiable, pytree.tree_leaves(outputs)), *record.added]


def _shared_storage(inputs: Sequence[torch.Tensor], outputs: Any) -> list[tuple[Callable[[], int], int]]:
    """See `Record.shared`."""
    leaves = [*filter(differentiable, pytree.tree_leaves(outputs))]
    storages = Counter(storage_of(leaf) for leaf in leaves)
    storages.update({storage_of(tensor) for tensor in inputs if tensor.requires_grad})
    probes = [leaf.detach() for leaf in leaves if storages[storage_of(leaf)] > 1]
    for probe in probes:  # holds no memory, and still counts changes
        probe.data = probe.new_empty(0)
    return [(partial(getattr, probe, "_version"), probe._version) for probe in probes]


@contextmanager
def autocast(call: UnitCall, device: torch.device) -> Iterator[None]:
    """A context with the call's own autocast."""
    enabled, dtype = call.autocast
    if not enabled:
        yield
        return
    with torch.autocast(device.type, dtype=dtype):
        yield
