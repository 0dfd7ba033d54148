"""A dry forward on the meta device: the order of units, what they keep for backward, and which can't be units.

Nothing is computed and nothing allocated: meta tensors carry shapes only. The plan's figures for activations come
from here, and so does the first prediction of the sweep's route. A model that asks what no shape can answer is surveyed
on real data instead (trial.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from zinf_cli.engine.compute.activations import SMALL
from zinf_cli.engine.compute.carriers import Reach, differentiable, opened
from zinf_cli.engine.compute.leaks import Calls, through_door
from zinf_cli.engine.compute.meta_answers import answer_of
from zinf_cli.engine.compute.micro_batch import SideOutputs
from zinf_cli.engine.compute.moving_state import MovingState
from zinf_cli.engine.compute.trial import Trial, TrialWeights
from zinf_cli.engine.units.tiles import TiledWeight, computed_by_tiles
from zinf_cli.engine.units.units import UnitLayout, discover
from zinf_cli.engine.units.written_weights import WrittenWeights, storage_of
from zinf_cli.errors import ModelError
from zinf_cli.model_state import round_up


@dataclass
class UnitUse:
    """What one call of a unit moves and keeps, in bytes for one micro-batch."""

    input_bytes: int = 0
    """Differentiable inputs that no unit before has taken, in whole pages: what the tape saves."""
    call_bytes: int = 0
    """Differentiable inputs of one call, in whole pages: what its backward brings back."""
    saved_bytes: int = 0
    """What autograd saves inside the unit, in whole pages, without weights and what is there anyway."""
    output_bytes: int = 0
    before_bytes: int = 0
    """What autograd saves between the unit that was called before and this one, at most, in whole pages."""


@dataclass
class Survey:
    """One forward of one micro-batch, seen from outside."""

    units: tuple[UnitLayout, ...]
    order: tuple[int, ...]
    """Unit indices in the order they are called."""
    uses: dict[int, UnitUse] = field(default_factory=dict)
    glue_bytes: int = 0
    """What autograd saves between units, the part after the last unit (the loss) excepted."""
    loss_bytes: int = 0
    """What autograd saves after the last unit."""
    live_bytes: int = 0
    """What lies between units while one of them is called, at most."""
    written: frozenset[str] = frozenset()
    """Parameters that the forward itself writes to, by name, but for clamps: see constant_weights.py."""
    demoted: frozenset[str] = frozenset()
    """Modules whose parameters are used outside of their own call, and so are held for the whole step."""
    failure: str = ""
    """Why the forward could not be run to its end: then sizes are missing, and the order is module order."""

    def grown(self, factor: float) -> Survey:
        """The same with `factor` times the bytes."""

        def more(num_bytes: int) -> int:
            return round_up(int(num_bytes * factor))

        uses = {number: UnitUse(*map(more, astuple(use))) for number, use in self.uses.items()}
        glue, loss, live = map(more, (self.glue_bytes, self.loss_bytes, self.live_bytes))
        return replace(self, uses=uses, glue_bytes=glue, loss_bytes=loss, live_bytes=live)


def survey(
    model: nn.Module,
    forward: Callable[[], torch.Tensor],
    world_size: int,
    trial: Trial | None = None,
    demoted: frozenset[str] = frozenset(),
    side: SideOutputs | None = None,
    most: int | None = None,
) -> Survey:
    """Discover the units of `model` (parameters on the meta device) and run `forward()` once on the meta device.

    Modules whose parameters are used outside of their own call become resident, and the units are found again;
    `demoted` names some of them beforehand. A unit that is neither called nor read, such as a part for images, stays
    where it is. With a `trial`, `forward()` computes on its device, with real weights. ModelError where the loss
    depends on what goes past the arguments and results of a unit (leaks.py), those of `side` excepted.
    Of a model that was cut (tiles.py), `most` is the largest number of elements of a part.
    """
    trained = _trained(model)
    state = MovingState(model)
    while True:
        units = discover(model, world_size, demoted, most)
        state.begin()
        with ExitStack() as undo:
            undo.callback(state.put_back)
            undo.enter_context(_untouched(model, trial.device if trial is not None else torch.device("meta")))
            watch = _Watch(model, units, TrialWeights(model, trial) if trial is not None else None, side)
            failure = ""
            try:
                with watch.watching():
                    loss = forward()
            except ModelError:
                raise
            except Exception as error:  # a model may do with what it gets whatever it likes
                failure = f"{type(error).__name__}: {error}"
        if _trained(model) != trained:
            raise ModelError("the model's forward switches which of its parameters are trained")
        if watch.misused - demoted:
            demoted |= watch.misused
            continue
        units, written = watch.writes.bounds_in(units), watch.writes.names
        if failure:
            order = tuple(n for n, unit in enumerate(units) if not unit.resident)
            return Survey(units, order, written=written, demoted=demoted, failure=failure)
        watch.calls.check(loss)
        sizes = watch.glue_bytes, watch.tail_bytes, watch.live_bytes
        return Survey(units, tuple(watch.order), watch.uses, *sizes, written, demoted)


def _trained(model: nn.Module) -> list[str]:
    """Names of the parameters that are. ModelError where one has hooks: its gradient never comes to it whole."""
    for name, param in model.named_parameters():
        if param._backward_hooks or param._post_accumulate_grad_hooks:
            raise ModelError(f"the gradient of {name} has a hook, which is not called where weights are streamed")
    return [name for name, param in model.named_parameters() if param.requires_grad]


class _Watch(TorchFunctionMode):
    """Counts what goes in and out of units, and notices parameters that are used outside of theirs."""

    def __init__(
        self, model: nn.Module, units: Sequence[UnitLayout], weights: TrialWeights | None, side: SideOutputs | None
    ) -> None:
        super().__init__()
        self.calls = Calls()
        self._side = side
        self.order: list[int] = []
        self.uses: dict[int, UnitUse] = {}
        self.misused: set[str] = set()
        self.glue_bytes = 0
        self.tail_bytes = 0
        self.live_bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        """Storages that were made between units, and their bytes."""
        self._model = model
        self._units = units
        self._weights = weights
        self._binding = False
        """What binds weights is no part of the forward."""
        self._active: list[int] = []
        self._owner: dict[int, int] = {}
        self.writes = WrittenWeights()
        self._seen: set[int] = set()
        self._saved: set[int] = set()
        """Of these, what calls of units have saved. Each call saves its own, and so again, see keep.py:"""
        self._again: set[int] = set()
        self._known: list[StorageWeakRef] = []
        """Of storages that have a number in one of these: it stays theirs when they are freed."""
        for number in range(len(units)):
            self._note_weights(number)
        self._inputs: dict[tuple[int, int], Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._binding:
            return func(*args, **(kwargs or {}))
        if (by_tiles := computed_by_tiles(func, types)) is not None:
            with self:
                return by_tiles(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name != "__get__":  # reading weight.dtype uses no data
            for leaf in pytree.tree_leaves((args, kwargs)):  # a view of a weight is one, too: W.T, W.data
                owner = self._owner.get(storage_of(leaf)) if _is_state(leaf) else None
                if owner is not None and owner not in self._active:
                    self.misused.update(self._units[owner].modules)
        if name == "register_hook" and not self._active:
            raise ModelError(
                "the model hooks a gradient between its layers, where it comes in parts",
                hint="a hook on a tensor inside of a layer can be trained",
            )
        self.writes.see(func, args, kwargs or {})
        answer = answer_of(name, func, args, kwargs or {})
        result = func(*args, **(kwargs or {})) if answer is NotImplemented else answer
        if not self._active:
            self._note_live(pytree.tree_leaves(result))
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        restore = [self._wrap(number, path) for number, unit in enumerate(self._units) for path in unit.modules]
        self._note_seen(self._model.buffers())
        try:
            with ExitStack() as held:
                for number, unit in enumerate(self._units):
                    if unit.resident:
                        held.enter_context(self._bound(number))
                held.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept))
                held.enter_context(self)
                yield
        finally:
            for module in restore:
                del module.__dict__["forward"]

    def _wrap(self, number: int, path: str) -> nn.Module:
        module = self._model.get_submodule(path)
        own = module.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            # One inside of another has to be resident; so has one whose graph the model makes in a backward of its own.
            if self._active or (self._units[number].trainable and not torch.is_grad_enabled()):
                self.misused.update(self._units[number].modules)
                return own(*args, **kwargs)
            collector = self._side.collector() if self._side is not None else None
            if self._side is None or collector is None:
                return self._watched(number, own, args, kwargs)
            outputs, captured = self._watched(number, self._side.capture(collector, own), args, kwargs)
            self._side.deliver(collector, captured)
            return outputs

        module.forward = watched
        return module

    def _watched(self, number: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a unit, as the tape has it: through doors."""
        use = self.uses.setdefault(number, UnitUse())
        flat, spec = opened(args, kwargs)
        reach = Reach(flat)
        leaves = [t for t in (*pytree.tree_leaves((args, kwargs)), *reach.tensors) if isinstance(t, torch.Tensor)]
        inputs = {id(t): t for t in leaves if t.requires_grad}
        self._note_seen(t for t in leaves if not t.requires_grad)
        self._again = self._saved - {storage_of(t) for t in leaves if not t.requires_grad}
        sizes = {key: round_up(t.numel() * t.element_size()) for key, t in inputs.items()}
        use.input_bytes += sum(sizes[key] for key, t in inputs.items() if self._is_new(t))
        use.call_bytes = max(use.call_bytes, sum(sizes.values()))
        self.order.append(number)
        use.before_bytes = max(use.before_bytes, self.tail_bytes)
        self.glue_bytes += self.tail_bytes
        self.tail_bytes = 0
        self._count_live()
        self._active.append(number)
        try:
            with self._bound(number), self.calls.of(self._units[number].name):
                entered = {key: through_door(tensor) for key, tensor in inputs.items()}
                reach.put(lambda value: entered.get(id(value), value))
                flat = [entered.get(id(leaf), leaf) for leaf in flat]
                before = Reach(flat)
                args, kwargs = pytree.tree_unflatten(flat, spec)
                outputs = forward(*args, **kwargs)
        finally:
            self._active.pop()
        left = before.after(outputs)
        added = left.added_since(before)
        leaves = [t for t in (*pytree.tree_leaves(outputs), *added) if isinstance(t, torch.Tensor)]
        use.output_bytes += sum(t.numel() * t.element_size() for t in leaves)
        self._note_live(leaves)
        back = {id(entered[key]): tensor for key, tensor in inputs.items()}
        back |= {id(tensor): _as_emitted(tensor) for tensor in added}
        left.put(lambda value: back.get(id(value), value))
        return pytree.tree_map(_as_emitted, outputs)

    @contextmanager
    def _bound(self, number: int) -> Iterator[None]:
        """For a call of the unit, its real weights are there."""
        if self._weights is None:
            yield
            return
        self._binding = True
        self._weights.bind(self._units[number])
        self._note_weights(number)
        self._binding = False
        try:
            yield
        finally:
            self._binding = True
            self._weights.unbind(self._units[number])
            self._binding = False

    def _note_weights(self, number: int) -> None:
        """Where the parameters of a unit lie now."""
        for place in self._units[number].params():
            param = self._model.get_parameter(place.name)
            self._note_seen([param])
            self.writes.watch(place.name, param)
            if not self._units[number].resident:
                self._owner[storage_of(param)] = number

    def _note_seen(self, tensors: Iterable[torch.Tensor]) -> None:
        """They are there anyway: no memory is needed for what shares theirs."""
        for tensor in tensors:
            self._seen.add(storage_of(tensor))
            self._known.append(StorageWeakRef(tensor.untyped_storage()))

    def _note_live(self, values: Iterable[Any]) -> None:
        """What a micro-batch holds between units, as long as something refers to it."""
        for value in values:
            if not _is_state(value) or torch._C._functorch.is_functorch_wrapped_tensor(value):  # vmap's have no storage
                continue
            if (key := storage_of(value)) not in self._live and key not in self._seen:
                storage = value.untyped_storage()
                self._live[key] = (StorageWeakRef(storage), storage.nbytes())

    def _count_live(self) -> None:
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.live_bytes = max(self.live_bytes, sum(num_bytes for _, num_bytes in self._live.values()))

    def _is_new(self, tensor: torch.Tensor) -> bool:
        """Whether no unit has taken this tensor before: the tape keeps it once."""
        edge = torch.autograd.graph.get_gradient_edge(tensor)
        key = (id(edge.node), edge.output_nr)
        new = key not in self._inputs
        self._inputs[key] = edge.node  # kept, so that its id stays its own
        return new

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Counts what autograd saves, and keeps none of it where it takes memory: there is no backward."""
        storage = storage_of(tensor)
        if storage not in self._seen or (self._active and storage in self._again):
            self._note_seen([tensor])
            self._again.discard(storage)
            num_bytes = tensor.untyped_storage().nbytes()
            if self._active:
                self._saved.add(storage)
                self.uses[self._active[-1]].saved_bytes += round_up(num_bytes) if num_bytes >= SMALL else 0
            else:
                self.tail_bytes += round_up(num_bytes) if num_bytes >= SMALL else 0
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _as_emitted(leaf: Any) -> Any:
    """The tape makes every floating output of a unit one with a gradient."""
    if not differentiable(leaf) or not torch.is_grad_enabled():
        return leaf
    return through_door(leaf if leaf.requires_grad else leaf.detach().requires_grad_())


def _is_state(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and not isinstance(value, TiledWeight)


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """For a time, the modules hold copies on `device` of all their tensors; then everything is as it was before.

    A forward leaves things in modules: rotary frequencies for a longer text, the longest text so far, a state.
    """
    modules = [(module, dict(module.__dict__)) for module in model.modules()]
    held = Reach([tuple(attributes.values()) for _, attributes in modules], most=sys.maxsize)
    try:
        for module, _ in modules:
            for owner in (module._buffers, module.__dict__):
                tensors = {n: value for n, value in owner.items() if _is_state(value)}
                owner.update({n: value.to(device, copy=True) for n, value in tensors.items()})
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            yield
    finally:
        for module, attributes in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        held.put()
