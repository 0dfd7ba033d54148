"""A micro-batch under way: the model's own forward in a thread, paused at every unit.

In a layer-major sweep all micro-batches pass unit k before any passes unit k+1. So each forward has to stop in the
middle, and runs in a thread of its own. Grad mode and autocast are thread-local, so contexts that span units stay
right. Only one thread is awake at a time. At a unit a forward hands its call to the compute thread and sleeps. That
keeps the heavy work on one thread, with one pool of OpenMP workers.

The glue between units runs on one core. OpenMP keeps a pool of workers for every thread that has ever used one. Once
there are more workers than cores, idle workers sleep and no longer spin. To wake them makes every small operation of
the compute thread four times slower (measured: AdamW 0.16 instead of 0.63 G parameters/s on 2 cores).
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from zinf_cli.engine.compute.products import is_one_product
from zinf_cli.engine.units.forwards import replace_forward
from zinf_cli.engine.units.loss_chunks import with_whole_logits
from zinf_cli.engine.units.tiles import Tile, TiledWeight
from zinf_cli.engine.units.units import UnitLayout
from zinf_cli.errors import ModelError
from zinf_cli.tiers.streams import streams_of


@dataclass
class UnitCall:
    """A micro-batch calls a unit. Run `forward(*args, **kwargs)` and resume the micro-batch with the result."""

    unit: int
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad_enabled: bool
    autocast: tuple[bool, torch.dtype]
    product: bool = False
    """Whether it returns a product and nothing else: see products.py."""


@dataclass
class Finished:
    """The forward returned its loss."""

    loss: torch.Tensor
    variables: Mapping[ContextVar[Any], Any] = field(default_factory=dict)
    """The context variables that it has set, with their values."""


@dataclass
class _Failed:
    error: BaseException


class SideOutputs(Protocol):
    """How a model hands tensors from inside a unit to code outside of it, beside return values (forward hooks).

    The engine makes them outputs of the unit, so that gradients flow through them and a recompute yields them again.
    """

    def collector(self) -> Any:
        """The collector that is active now, or None. Called in the micro-batch's thread."""

    def capture(self, collector: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that returns (outputs, captured) and does not touch `collector`. It may run in another thread."""

    def deliver(self, collector: Any, captured: Any) -> None:
        """Give what was captured to the collector. Called in the micro-batch's thread."""


_running = threading.local()
_symbols = ctypes.CDLL(torch._C.__file__)


class _Abandoned(BaseException):
    """Raised inside a paused forward that is given up."""


class MicroBatchThread:
    """Runs one forward at a time. `start` and `resume` return when it pauses at a unit or ends."""

    def __init__(self, number: int, device: torch.device) -> None:
        self._device = device
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[UnitCall | Finished | _Failed] = queue.SimpleQueue()
        self._paused = False
        self.experts: Sequence[int] = ()
        """The units of experts that its tokens are routed to in the present layer."""
        self._thread = threading.Thread(target=self._loop, name=f"micro-batch-{number}", daemon=True)
        self._thread.start()

    def start(
        self, forward: Callable[[], torch.Tensor], *, grad: bool, within: AbstractContextManager[Any] | None = None
    ) -> UnitCall | Finished:
        """Run `forward` in the thread, within a context of that thread and with the caller's context variables."""
        return self._hand_over((forward, grad, within or nullcontext(), copy_context()))

    def resume(self, outputs: Any) -> UnitCall | Finished:
        """Go on with what the paused call returns to the model. Returns where the forward pauses or ends next."""
        return self._hand_over(outputs)

    def abandon(self) -> None:
        """Give up a paused forward: an exception unwinds it."""
        if self._paused:
            self._inbox.put(_Abandoned())
            self._outbox.get()
            self._paused = False

    def close(self) -> None:
        """End the thread."""
        self.abandon()
        self._inbox.put(None)
        self._thread.join()

    def _hand_over(self, message: Any) -> UnitCall | Finished:
        self._inbox.put(message)
        answer = self._outbox.get()
        self._paused = isinstance(answer, UnitCall)
        if isinstance(answer, _Failed):
            raise answer.error
        return answer

    def _loop(self) -> None:
        _running.thread = self
        streams_of(self._device).set_device(self._device)
        torch.get_num_threads()  # makes torch set up this thread now; later that would undo the limits below
        for limit in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"):
            if hasattr(_symbols, limit):
                getattr(_symbols, limit)(1)
        while (job := self._inbox.get()) is not None:
            forward, grad, within, variables = job
            before = dict(variables)
            answer: Finished | _Failed
            try:
                with torch.set_grad_enabled(grad), within:
                    answer = Finished(variables.run(forward), _changed(before, variables))
            except BaseException as error:
                answer = _Failed(error)
            del job, forward, within, variables, before
            self._outbox.put(answer)
            del answer

    def call_unit(
        self,
        unit: int,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        side: SideOutputs | None,
        *,
        product: bool,
    ) -> Any:
        """Called inside the thread: pause at a unit, and return its outputs."""
        collector = side.collector() if side is not None and not product else None  # a product has no inside
        if side is not None and collector is not None:
            outputs, captured = self._pause(unit, side.capture(collector, forward), args, kwargs)
            side.deliver(collector, captured)
            return outputs
        return self._pause(unit, forward, args, kwargs, product=product)

    def _pause(self, unit: int, forward: Callable[..., Any], args: Any, kwargs: Any, *, product: bool = False) -> Any:
        kind = self._device.type
        autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        variables = copy_context()
        runs: list[Context] = []

        def within(*args: Any, **kwargs: Any) -> Any:
            """The forward with this thread's context variables. Each run begins with their values at the pause."""
            runs.append(variables.copy())
            return runs[-1].run(forward, *args, **kwargs)

        self._outbox.put(UnitCall(unit, within, args, kwargs, torch.is_grad_enabled(), autocast, product))
        outputs = self._inbox.get()
        if isinstance(outputs, _Abandoned):
            raise outputs
        for variable, value in _changed(variables, runs[0]).items():
            variable.set(value)
        return outputs


def _changed(before: Mapping[ContextVar[Any], Any], after: Mapping[ContextVar[Any], Any]) -> dict[ContextVar[Any], Any]:
    return {name: value for name, value in after.items() if name not in before or before[name] is not value}


def intercept(model: nn.Module, units: Sequence[UnitLayout], side: SideOutputs | None) -> Callable[[], None]:
    """Route the forward of every unit's modules through the micro-batch. Returns what undoes it."""
    undo = []
    units_of = {model.get_submodule(path): unit for unit, layout in enumerate(units) for path in layout.modules}
    for module in model.modules():
        experts = _tiles_of_experts(module)
        if experts and all(tile in units_of for tile in experts):
            undo.append(replace_forward(module, _telling([units_of[tile] for tile in experts], module.forward)))
    for unit, layout in enumerate(units):
        for path in layout.modules:
            module = model.get_submodule(path)
            undo.append(replace_forward(module, _routed(unit, path, module, side)))

    def restore() -> None:
        while undo:
            undo.pop()()

    return restore


def _tiles_of_experts(module: nn.Module) -> Sequence[Tile]:
    """The tile of each expert whose weights were cut from the module; none if there are no such weights."""
    cut_weights = [weight for weight in module.__dict__.values() if isinstance(weight, TiledWeight)]
    pieces = max((weight.pieces for weight in cut_weights), key=len, default=())
    return [piece.tile for piece in pieces if piece.expert is not None]


def _telling(experts: Sequence[int], forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a layer's experts, whose arguments tell the choices of each token (int64 [tokens, choices])."""

    def telling(*args: Any, **kwargs: Any) -> Any:
        thread: MicroBatchThread | None = getattr(_running, "thread", None)
        choices = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.dtype == torch.int64]
        if thread is None or len(choices) != 1 or choices[0].dim() != 2:
            return forward(*args, **kwargs)
        thread.experts = [experts[choice] for choice in choices[0].unique().tolist() if 0 <= choice < len(experts)]
        try:
            return forward(*args, **kwargs)
        finally:
            thread.experts = ()

    return telling


def _routed(unit: int, path: str, module: nn.Module, side: SideOutputs | None) -> Callable[..., Any]:
    forward = module.forward

    def routed(*args: Any, **kwargs: Any) -> Any:
        thread: MicroBatchThread | None = getattr(_running, "thread", None)
        if thread is None:
            raise ModelError(
                f"module {path} is called from inside another unit",
                hint="the engine found it to be called by itself; please report the architecture",
            )
        args, kwargs = with_whole_logits(args, kwargs)
        return thread.call_unit(unit, forward, args, kwargs, side, product=is_one_product(module, args))

    return routed
