"""Surveys a model by one forward on the meta device: the order of units, what they keep, and which modules are none.

Meta tensors have shapes and no values, so nothing is computed and no memory is taken. The plan has its figures for
activations from here, and the sweep its first route. A model that asks for values is surveyed on real data (trial.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field, replace
from typing import Any

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
from zinf_cli.engine.compute.products import is_one_product
from zinf_cli.engine.compute.spared import Unneeded
from zinf_cli.engine.compute.trial import Trial, TrialWeights
from zinf_cli.engine.compute.untouched import is_state, untouched
from zinf_cli.engine.units.chunked_loss import temporary_bytes
from zinf_cli.engine.units.loss_chunks import with_whole_logits
from zinf_cli.engine.units.tiles import computed_instead
from zinf_cli.engine.units.units import UnitLayout, discover
from zinf_cli.engine.units.written_weights import WrittenWeights, shares_memory_with, storage_of
from zinf_cli.errors import ModelError
from zinf_cli.model_state import round_up


@dataclass
class UnitUse:
    """What one call of a unit moves and keeps, in bytes for one micro-batch."""

    input_bytes: int = 0
    """Differentiable inputs that no earlier call has taken, in whole pages. The tape saves these."""
    call_bytes: int = 0
    """Differentiable inputs of the largest call, in whole pages. Its backward brings these back."""
    saved_bytes: int = 0
    """What autograd saves inside the unit, in whole pages, without weights and other tensors that are there anyway."""
    output_bytes: int = 0
    before_bytes: int = 0
    """The most that the code between the unit called before and this one needs in backward, in whole pages."""
    taken_bytes: int = 0
    """Differentiable inputs of all calls, in whole pages. Their backwards bring these back."""
    sent_bytes: int = 0
    """What autograd saves before its calls, in whole pages, without what it has saved between units before."""
    again_bytes: int = 0
    """What it saves there, and had saved between units before."""
    mapped_bytes: int = 0
    """The part of `saved_bytes` in blocks that malloc maps by themselves."""


@dataclass
class Survey:
    """What one forward of one micro-batch shows."""

    units: tuple[UnitLayout, ...]
    order: tuple[int, ...]
    """Indices of units in the order of their calls."""
    learned: tuple[int, ...]
    """The same, of the calls that have a backward: those of units that train something, and those whose input needs a
    gradient."""
    uses: dict[int, UnitUse] = field(default_factory=dict)
    glue_bytes: int = 0
    """Bytes that autograd saves between units, without those after the last unit."""
    loss_bytes: int = 0
    """Bytes that autograd saves after the last unit, for the loss."""
    live_bytes: int = 0
    """The most bytes of tensors between units that are alive while a unit is called."""
    written: frozenset[str] = frozenset()
    """Names of parameters that the forward itself writes to, without those it clamps: see constant_weights.py."""
    demoted: frozenset[str] = frozenset()
    """Modules whose parameters are used outside of their own call. They are held for the whole step."""
    products: frozenset[int] = frozenset()
    """Indices of units that are not computed again in backward (products.py)."""
    spared: frozenset[str] = frozenset()
    """Names of Linears in units whose products are not computed again in backward (spared.py)."""
    failure: str = ""
    """Why the forward did not come to its end, if so. Then sizes are missing, and the order is module order."""

    def grown(self, factor: float) -> Survey:
        """The same survey with `factor` times the bytes."""

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
    `demoted` names some of them beforehand. A unit that the forward neither calls nor reads, such as a part for images,
    stays on its tier. With a `trial`, `forward()` computes on the trial's device with real weights. `most` is the
    largest number of elements of a part of a model that was cut. ModelError for a leak; what `side` captures is none.
    """
    trained = _trained(model)
    state = MovingState(model, shares_memory_with(model.parameters()))
    while True:
        units = discover(model, world_size, demoted, most)
        state.begin()
        with ExitStack() as undo:
            undo.callback(state.put_back)
            undo.enter_context(untouched(model, trial.device if trial is not None else torch.device("meta")))
            watch = _Watch(model, units, TrialWeights(model, trial) if trial is not None else None, side)
            failure = ""
            try:
                with watch.watching():
                    loss = forward()
                state.refuse_views()
            except ModelError:
                raise
            except Exception as error:  # a model may do anything with its inputs
                failure = f"{type(error).__name__}: {error}"
        if _trained(model) != trained:
            raise ModelError("the model's forward switches which of its parameters are trained")
        if watch.misused - demoted:
            demoted |= watch.misused
            continue
        units, written = watch.writes.bounds_in(units), watch.writes.names
        if failure:
            order = tuple(n for n, unit in enumerate(units) if not unit.resident)
            return Survey(units, order, order, written=written, demoted=demoted, failure=failure)
        watch.calls.check(loss)
        order, learned = tuple(watch.order), tuple(watch.learned)
        sizes, products = (watch.glue_bytes, watch.tail_bytes, watch.live_bytes), frozenset(watch.products)
        return Survey(units, order, learned, watch.uses, *sizes, written, demoted, products, watch.unneeded.found)


def _trained(model: nn.Module) -> list[str]:
    """Names of the trained parameters. ModelError where one has hooks: they would never see its whole gradient."""
    for name, param in model.named_parameters():
        if param._backward_hooks or param._post_accumulate_grad_hooks:
            raise ModelError(f"the gradient of {name} has a hook, which is not called where weights are streamed")
    return [name for name, param in model.named_parameters() if param.requires_grad]


class _Watch(TorchFunctionMode):
    """Counts what goes in and out of units, and notices parameters that are used outside of their unit."""

    def __init__(
        self, model: nn.Module, units: Sequence[UnitLayout], weights: TrialWeights | None, side: SideOutputs | None
    ) -> None:
        super().__init__()
        self.calls, self.unneeded = Calls(), Unneeded(model)
        self._side = side
        self.order: list[int] = []
        self.learned: list[int] = []
        self.uses: dict[int, UnitUse] = {}
        self.misused, self.products = set[str](), set[int]()
        self.glue_bytes = self.tail_bytes = self.live_bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        """Storages that were made between units, with their bytes."""
        self._model = model
        self._units = units
        self._weights = weights
        self._binding = False
        """True while weights are bound or unbound, which is no part of the forward."""
        self._active: list[int] = []
        self._owner: dict[int, int] = {}
        self.writes = WrittenWeights()
        self._seen: set[int] = set()
        self._saved: set[int] = set()
        """The storages of `_seen` that calls of units have saved."""
        self._between, self._tail = set[int](), set[int]()
        """Those that were saved between units, and of them those saved since the last call of a unit."""
        self._tail_again: dict[int, int] = {}
        """Those saved since then that were saved before it as well, with their bytes."""
        self._again: set[int] = set()
        """Those that count again if the call under way saves them: each call has a Keeper of its own (keep.py)."""
        self._known: list[StorageWeakRef] = []
        """References to the storages in these sets. They reserve a storage's number after it is freed."""
        for number in range(len(units)):
            self._note_weights(number)
        self._inputs: dict[tuple[int, int], Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._binding:
            return func(*args, **(kwargs or {}))
        if (instead := computed_instead(func, types, args)) is not None:
            with self:
                return instead(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name != "__get__":  # reading weight.dtype uses no data
            for leaf in pytree.tree_leaves((args, kwargs)):  # also finds views of a weight: W.T, W.data
                owner = self._owner.get(storage_of(leaf)) if is_state(leaf) else None
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
            # A unit inside of another has to be resident. So has a unit that runs without grad: the model makes its
            # graph in a backward of its own.
            if self._active or (self._units[number].trainable and not torch.is_grad_enabled()):
                self.misused.update(self._units[number].modules)
                return own(*args, **kwargs)
            collector = self._side.collector() if self._side is not None else None
            args, kwargs = with_whole_logits(args, kwargs)
            if is_one_product(module, args):
                self.products.add(number)
            if self._side is None or collector is None:
                return self._watched(number, own, args, kwargs)
            outputs, captured = self._watched(number, self._side.capture(collector, own), args, kwargs)
            self._side.deliver(collector, captured)
            return outputs

        module.forward = watched
        return module

    def _watched(self, number: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a unit as the tape does, with doors for its inputs and outputs."""
        use = self.uses.setdefault(number, UnitUse())
        weights = self._units[number].flats[0]
        taken, mapped = temporary_bytes(args, weights.params[0].shape, weights.dtype)
        use.saved_bytes, use.mapped_bytes = use.saved_bytes + taken, use.mapped_bytes + mapped
        flat, spec = opened(args, kwargs)
        reach = Reach(flat)
        leaves = [t for t in (*pytree.tree_leaves((args, kwargs)), *reach.tensors) if isinstance(t, torch.Tensor)]
        inputs = {id(t): t for t in leaves if t.requires_grad}
        self._note_seen(t for t in leaves if not t.requires_grad)
        self._again = self._saved - {storage_of(t) for t in leaves if not t.requires_grad}
        on_demand = self._units[number].on_demand  # how many tokens an expert takes, only the text tells
        sizes = {key: (round_up if on_demand else _leaving)(t.numel() * t.element_size()) for key, t in inputs.items()}
        use.input_bytes += sum(sizes[key] for key, t in inputs.items() if self._is_new(t))
        use.call_bytes = max(use.call_bytes, sum(sizes.values()))
        use.taken_bytes += sum(sizes.values())
        learns = bool(self._units[number].trainable or inputs)
        for calls in (self.order, self.learned) if learns else (self.order,):
            if not on_demand or calls[-1:] != [number]:  # one visit has all calls of an expert
                calls.append(number)
        if not learns:
            with self._active_in(number), torch.no_grad():
                return forward(*args, **kwargs)
        use.before_bytes = max(use.before_bytes, self.tail_bytes + sum(self._tail_again.values()))
        use.sent_bytes += self.tail_bytes
        use.again_bytes += sum(self._tail_again.values())
        self.glue_bytes += self.tail_bytes
        self.tail_bytes, self._tail, self._tail_again = 0, set(), {}
        self._count_live()
        with self._active_in(number), self.calls.of(self._units[number].name), self.unneeded.watching():
            entered = {key: through_door(tensor) for key, tensor in inputs.items()}
            reach.put(lambda value: entered.get(id(value), value))
            flat = [entered.get(id(leaf), leaf) for leaf in flat]
            before = Reach(flat)
            args, kwargs = pytree.tree_unflatten(flat, spec)
            outputs = forward(*args, **kwargs)
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
    def _active_in(self, number: int) -> Iterator[None]:
        """A context for the call of a unit."""
        self._active.append(number)
        try:
            with self._bound(number):
                yield
        finally:
            self._active.pop()

    @contextmanager
    def _bound(self, number: int) -> Iterator[None]:
        """A context in which the unit has its real weights, if there is a trial."""
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
        """Note where the parameters of a unit lie now."""
        for place in self._units[number].params():
            param = self._model.get_parameter(place.name)
            self._note_seen([param])
            self.writes.watch(place.name, param)
            if not self._units[number].resident:
                self._owner[storage_of(param)] = number

    def _note_seen(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note tensors that are there anyway. What shares their memory takes none."""
        for tensor in tensors:
            self._seen.add(storage_of(tensor))
            self._known.append(StorageWeakRef(tensor.untyped_storage()))

    def _note_live(self, values: Iterable[Any]) -> None:
        """Note tensors that a micro-batch holds between units. Each counts as long as something refers to it."""
        for value in values:
            if not is_state(value) or torch._C._functorch.is_functorch_wrapped_tensor(value):  # vmap's have no storage
                continue
            if (key := storage_of(value)) not in self._live and key not in self._seen:
                storage = value.untyped_storage()
                self._live[key] = (StorageWeakRef(storage), storage.nbytes())

    def _count_live(self) -> None:
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.live_bytes = max(self.live_bytes, sum(num_bytes for _, num_bytes in self._live.values()))

    def _is_new(self, tensor: torch.Tensor) -> bool:
        """Whether no unit has taken this tensor before. The tape saves a tensor once."""
        edge = torch.autograd.graph.get_gradient_edge(tensor)
        key = (id(edge.node), edge.output_nr)
        new, self._inputs[key] = key not in self._inputs, edge.node  # holds the node, so that no other gets its id
        return new

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Count what autograd saves. A meta tensor is saved in its place, since there is no backward."""
        storage, num_bytes = storage_of(tensor), _leaving(tensor.untyped_storage().nbytes())
        if self._active:
            self.unneeded.save(tensor)
            if storage not in self._seen or storage in self._again:
                self._note_seen([tensor])
                self._again.discard(storage)
                self._saved.add(storage)
                self.uses[self._active[-1]].saved_bytes += num_bytes
        elif storage in self._between:
            if storage not in self._tail:
                self._tail_again[storage] = num_bytes
        elif storage not in self._seen or storage in self._saved:
            self._note_seen([tensor])
            self._between.add(storage)
            self._tail.add(storage)
            self.tail_bytes += num_bytes
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _as_emitted(leaf: Any) -> Any:
    """The output as the tape emits it: every floating tensor has a gradient."""
    if not differentiable(leaf) or not torch.is_grad_enabled():
        return leaf
    return through_door(leaf if leaf.requires_grad else leaf.detach().requires_grad_())


def _leaving(num_bytes: int) -> int:
    """The bytes of a tensor of `num_bytes` on a tier: whole pages. A small one stays in memory."""
    return round_up(num_bytes) if num_bytes >= SMALL else 0
