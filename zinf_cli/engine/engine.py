"""The engine: an unmodified model, its state on tiers, one training step after another.

    engine = Engine(model, units, options, ranks, trace)
    engine.load(weights.read)
    for ...:
        result = engine.train_step(micro_batches, AdamW(lr))
    engine.flush()

`model` stays an ordinary module, which a micro-batch's `forward` calls as always. When `train_step` returns, the loss
and the gradient norm of the step are known. The update is made in the next forward (see pipeline.py), or by `flush`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from operator import attrgetter

import torch
from torch import nn

from zinf_cli.engine.clips import Clips
from zinf_cli.engine.compute.activations import Activations
from zinf_cli.engine.compute.dealing import Dealer
from zinf_cli.engine.compute.micro_batch import SideOutputs, intercept
from zinf_cli.engine.compute.moving_state import MovingState
from zinf_cli.engine.compute.spared import Spared
from zinf_cli.engine.compute.stored_places import restore, store
from zinf_cli.engine.compute.sweep import Sweep
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.options import EngineOptions, open_memory, open_tiers
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.destination import StateSink
from zinf_cli.engine.traffic.kernel import Kernel
from zinf_cli.engine.traffic.pipeline import Pipeline
from zinf_cli.engine.traffic.state import StateSource, fields_of, load_params, load_state, save_state
from zinf_cli.engine.traffic.visit import Kind, Visit
from zinf_cli.engine.units.constant_weights import hold_constant
from zinf_cli.engine.units.fused_norms import fuse_norms
from zinf_cli.engine.units.store import Flat, TierSet, Unit, to_placeholders
from zinf_cli.engine.units.units import UnitLayout
from zinf_cli.engine.units.weight_grads import add_up_in_products
from zinf_cli.model_state import ADAMW, FROZEN, Field, OptimizerState
from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.tier import Extent
from zinf_cli.told import Tell, nobody
from zinf_cli.trace import Trace

log = logging.getLogger("zinf")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class StepResult:
    """What is known of a step when its backward is done."""

    losses: list[float]
    """Of this rank: one unscaled fp32 value per micro-batch."""
    grad_norm: float
    """The 2-norm before clipping, over all ranks; NaN or infinite where the gradient is."""
    finite: bool
    """Whether the gradient and the losses of all ranks are finite. If not, nothing is updated."""
    wait_s: float
    """Seconds in which compute stood still for data."""
    updated: bool
    """Whether the update was made in the backward pass."""


class Engine:
    """Trains `model` (parameters on the meta device, each of the dtype it computes in) on the tiers of `options`."""

    def __init__(
        self,
        model: nn.Module,
        layouts: Sequence[UnitLayout],
        options: EngineOptions,
        ranks: Ranks | None = None,
        trace: Trace | None = None,
        *,
        optimizer: OptimizerState = ADAMW,
        order: Sequence[int] | None = None,
        learned: Sequence[int] | None = None,
        written: Collection[str] = (),
        side_outputs: SideOutputs | None = None,
        notice: Callable[[str], None] = log.warning,
    ) -> None:
        """`optimizer` declares the state that the kernel of every step updates. `order` is the expected order of units
        in a forward, by index, and `learned` those of them that have a backward; without it the first sweep finds out.
        `written` names parameters that the forward writes to: a write that changes one raises ModelError. CapacityError
        where a tier does not fit, TierError where a drive fails."""
        assert not optimizer.whole or ranks is None or ranks.world_size == 1, "a slice cuts matrices"
        self.model = model
        self._options = options
        self._optimizer = optimizer
        self._ranks = ranks or Ranks()
        self._notice_once, self.verifies = cache(notice), options.nvme_verify
        self.trace = trace or Trace()
        to_placeholders(model, options.device)
        self.opened = open_tiers(options, self.trace, self._ranks.rank, notice)
        self.tiers = TierSet(*(self.opened[tier] for tier in options.placement))
        cached = replace(self.tiers, **dict.fromkeys(options.cached_states, self.opened.get(options.cache_tier)))
        self.units = [
            Unit(layout, model, cached if number in options.cached_units else self.tiers, self._ranks, optimizer)
            for number, layout in enumerate(layouts)
        ]
        self.memory = open_memory(options)
        self._pipeline = Pipeline(self.units, self._ranks, self.memory, self.trace)
        staging = None if self.tiers.activations.in_place else Arena(options.staging_bytes, options.device)
        activations = Activations(self.tiers.activations, staging, self._pipeline.wait)
        self._state, self._spared = MovingState(model, self.memory.holds_weights), Spared(model, options.spared)
        self._sweep = Sweep(
            self._pipeline,
            activations,
            options.device,
            order,
            learned,
            options.kept_units,
            options.staying_units,
            self._state,
            self._spared,
            list(model.buffers()) if options.glue_leaves and staging is not None else None,
            self.trace,
        )
        self._own_forwards = self._replace_forwards(layouts, written, side_outputs)
        """Calls that give the model its own forwards back, to be made from the last to the first."""
        self._dealer = Dealer(options.micro_batches_per_sweep, self._state, self._ranks, notice)
        self._left: list[StateSink] = []
        """Completed checkpoints that units may still lie in."""
        self._clips = Clips(options.clips_worth)
        self._add_shadows()

    def _replace_forwards(
        self, layouts: Sequence[UnitLayout], written: Collection[str], side_outputs: SideOutputs | None
    ) -> list[Callable[[], None]]:
        trained = (flat for unit in self.units for flat in unit.trained)
        touched = {id(p): partial(flat.touch, place) for flat in trained for place, p in enumerate(flat.params)}
        return [
            *add_up_in_products(self.model, self._options.device, touched),
            *fuse_norms(self.model, self._options.device),
            *self._spared.replace_forwards(),
            *hold_constant(self.model, layouts, written),
            intercept(self.model, layouts, side_outputs),
        ]

    def _add_shadows(self) -> None:
        places = (getattr(self.tiers, self._optimizer.param_class), self.tiers.optimizer)
        if self._options.speculate and not any(tier.in_place for tier in places):
            for number, unit in enumerate(self.units):
                if number not in self._options.cached_units:
                    unit.add_shadow()

    def load(self, read: Callable[[Sequence[str]], Mapping[str, torch.Tensor]], told: Tell = nobody) -> None:
        """Fill every unit from `read(parameter names)`, which gives tensors of any dtype. Memory is one unit's.

        `told` gets the share of the units that are filled.
        """
        load_params(self.units, self.memory, read, attrgetter("flats"), told)

    def train_step(
        self,
        batches: Sequence[MicroBatch],
        kernel: Kernel,
        *,
        max_grad_norm: float | None = 1.0,
        loss_scale: float = 1.0,
        eager: bool = False,
        more: bool = True,
        sink: StateSink | None = None,
    ) -> StepResult:
        """Forward and backward of all `batches` of this rank, each weighted. The update is left pending.

        Every rank passes the same number of batches. In the backward pass the losses are multiplied by `loss_scale`, so
        that gradients do not vanish in fp16. `more` says that another step follows. Where a loss or the gradient is not
        finite, on any rank, nothing is updated. With `eager`, which allows no `max_grad_norm` and no `loss_scale`, each
        unit is updated as soon as its gradient is complete. `sink` gets the state after this step; it is told to
        `complete` when the last update has been made, in the forward of the next step or in `flush`. ModelError where
        the model can't be trained this way, TierError where a transfer failed, CapacityError where buffers are too
        small.
        """
        kernel.check_state(self._optimizer)
        if eager and (max_grad_norm is not None or loss_scale != 1.0):
            raise ValueError("an eager update can't wait for the gradient norm")
        speculative = not eager and self._options.speculate and loss_scale == 1.0 and not self._clips.expected
        self._pipeline.eager.active, self._pipeline.eager.speculative = eager or speculative, speculative
        forward_done = partial(self._forward_done, kernel if eager or speculative else None, sink)
        batches = [replace(batch, weight=batch.weight * loss_scale) for batch in batches]
        losses = self._sweeps(batches, forward_done, kernel, undoable=not eager and sink is None)
        self._dealer.step_done()
        if more:
            self._sweep.announce_step(len(self._dealer.deal(batches)))
        self._pipeline.finish_gradients()
        norm = self._pipeline.norms.total() / loss_scale
        finite = math.isfinite(norm.item()) and self._all_finite(batches, losses)
        most = math.inf if max_grad_norm is None else max_grad_norm
        clip = torch.clamp(most / (norm + 1e-6), max=1.0)
        unclipped = finite and clip.item() == 1.0
        self._clips.count(clipped=not unclipped)
        completed = [self.units[number] for number in self._pipeline.completed]
        taken = set(self._pipeline.eager.made)
        waiting = [unit for unit in completed if unit not in taken]
        factor = clip / loss_scale
        update = replace(kernel, clip=None if factor.item() == 1.0 else factor.to(self._options.device))
        self._set_update(waiting, update, finite=finite)
        if speculative and unclipped:
            self._pipeline.eager.commit()
            self._pipeline.advance()
        elif speculative:
            self._roll_back(taken, update, finite=finite, written=sink is not None)
            if more:
                self._sweep.announce_step(len(self._dealer.deal(batches)))
        if sink is not None:
            self._copy_what_stays(sink)
        updated = eager or (speculative and unclipped)
        return StepResult([loss.item() for loss in losses], norm.item(), finite, self._pipeline.waited(), updated)

    def _sweeps(
        self, batches: Sequence[MicroBatch], forward_done: Callable[[], None], kernel: Kernel, *, undoable: bool
    ) -> list[torch.Tensor]:
        """Run the sweeps of a step. If the first step's backward changes the model, it is undone, and begins again."""

        def run() -> list[torch.Tensor]:
            return self._dealer.until_agreed(lambda: self._sweep.step(self._dealer.deal(batches), forward_done))

        losses = run()
        if self._sweep.moved_in_backward:
            self._dealer.step_moved_in_backward(begins_again=undoable)
            self._pipeline.finish_gradients()
            self._state.put_back()
            self._set_update([self.units[number] for number in self._pipeline.completed], kernel, finite=False)
            losses = run()
        return losses

    def _roll_back(self, taken: Collection[Unit], update: Kernel, *, finite: bool, written: bool) -> None:
        """Undo the speculative updates of the units `taken`: they get deferred ones. `written`: into a checkpoint."""
        self._pipeline.drop_coming()
        self._pipeline.eager.roll_back()
        if written:  # the deferred updates write the same regions: theirs has to be the last write
            self._pipeline.settle()
        self._set_update(taken, update, finite=finite)

    def evaluate(self, batches: Sequence[MicroBatch]) -> list[float]:
        """The unscaled losses of `batches`, forward only. Pending updates are made on the way."""
        losses = self._dealer.until_agreed(lambda: self._sweep.evaluate(self._dealer.deal(batches)))
        return [loss.item() for loss in losses]

    def flush(self) -> None:
        """Make every pending update. Afterwards the tiers hold the parameters of the last step."""
        self._pipeline.drop_coming()
        self._flush_pending()
        self._pipeline.settle()
        self._go_on_to(None)

    def save(self, sink: StateSink) -> None:
        """Make every pending update, then copy the state of every unit to `sink`."""
        self.flush()
        self._pipeline.updates.sink = sink
        self._copy([field for unit in self.units for field in fields_of(unit)], sink)
        self._go_on_to(None)

    def load_state(self, source: StateSource, told: Tell = nobody) -> None:
        """Take the state of every unit from `source`, instead of `load`."""
        load_state(self.units, self.memory, source, told)

    def load_unstored(self, read: Callable[[Sequence[str]], Mapping[str, torch.Tensor]], told: Tell = nobody) -> None:
        """After `load_state`, take from `read` what no checkpoint holds: the model that an adapter is trained on."""
        load_params([unit for unit in self.units if unit.unstored], self.memory, read, attrgetter("unstored"), told)

    def moved_places(self) -> dict[str, torch.Tensor]:
        """What the forward has changed in the model beside buffers, as tensors for a checkpoint (stored_places.py)."""
        tensors, left_out = store(self.model, self._state)
        self._say_lost(left_out, "is in no checkpoint")
        return tensors

    def restore_places(self, stored: Mapping[str, torch.Tensor]) -> None:
        """Put back what `moved_places` has given."""
        self._say_lost(restore(self._state, stored), "is not what it was at the checkpoint")

    def _say_lost(self, places: Sequence[str], what: str) -> None:
        for place in places:
            self._notice_once(f"{place}, which the model's forward changes, {what}: a run that goes on may differ")

    def read_params(self, number: int) -> dict[str, torch.Tensor]:
        """Copies of a unit's parameters by name, whole on every rank, in the shape and dtype that compute uses.

        If the unit has a pending update, it is made first.
        """
        unit = self.units[number]
        visit = Visit(number, Kind.FORWARD)
        self._pipeline.acquire_aside(visit)
        named = {
            place.name: place.view(flat).clone()
            for layout, flat in zip(unit.layout.flats, self._pipeline.held_flats(number), strict=True)
            for place in layout.params
        }
        self._pipeline.release(visit)
        return named

    def device_bytes(self) -> int:
        """The most bytes that buffers have held on the compute device, and those that the device tier holds."""
        arenas = (self.memory.slots, self.memory.resident, self.memory.chunks)
        kept = self.opened["device"].used if "device" in self.opened else 0
        return kept + sum(arena.peak for arena in arenas)

    def close(self) -> None:
        """End threads and close files; the model gets its own forwards back."""
        while self._own_forwards:
            self._own_forwards.pop()()
        self._sweep.close()
        for left in self._left:
            left.close()
        for tier in self.opened.values():
            tier.close()

    def _forward_done(self, kernel: Kernel | None, sink: StateSink | None) -> None:
        """The forward is over: make the updates of units that it passed by, and take the settings of this step."""
        self._flush_pending()
        self._pipeline.eager.finish()
        self._go_on_to(sink)
        self._pipeline.updates.kernel, self._pipeline.eager.kernel = None, kernel

    def _go_on_to(self, sink: StateSink | None) -> None:
        """Updates go into `sink` from now on. The sink before is complete; those that no unit lies in are closed."""
        before = self._pipeline.updates.sink
        if before is not None and before is not sink:
            before.complete()
            self._left.append(before)
        self._pipeline.updates.sink = sink
        places = [extent for unit in self.units for flat in unit.flats for extent in flat.at.values()]
        for left in list(self._left):
            if not any(map(left.holds, places)):
                left.close()
                self._left.remove(left)

    def _copy_what_stays(self, sink: StateSink) -> None:
        """Copy what this step does not update into its checkpoint."""
        updated = {self.units[number].name for number in self._pipeline.completed}
        stays = [
            (flat, field, extent)
            for unit in self.units
            for flat, field, extent in fields_of(unit)
            if field == FROZEN or unit.name not in updated  # of an adapted model there is no FROZEN field
        ]
        if stays:
            self._pipeline.drop_coming()
            self._pipeline.settle()
            self._copy(stays, sink)

    def _copy(self, fields: Sequence[tuple[Flat, Field, Extent]], sink: StateSink) -> None:
        regions = [(extent, sink.region(flat.unit, flat.number, field.stored)) for flat, field, extent in fields]
        save_state(regions, self.memory)

    def _flush_pending(self) -> None:
        if self._pipeline.updates.kernel is not None:
            self._pipeline.flush(number for number, unit in enumerate(self.units) if unit.life.update_due)
            self._pipeline.finish_flushes()

    def _all_finite(self, batches: Sequence[MicroBatch], losses: Sequence[torch.Tensor]) -> bool:
        """Whether the losses of all ranks are finite. Losses without weight do not count."""
        counted = [loss for batch, loss in zip(batches, losses, strict=True) if batch.weight]
        return min(self._ranks.all(int(all(math.isfinite(loss.item()) for loss in counted)))) == 1

    def _set_update(self, units: Collection[Unit], update: Kernel, *, finite: bool) -> None:
        """The norm is known: start the pending updates of `units` with the settings `update`."""
        for unit in units:
            if finite:
                unit.life.count_update()
            else:
                unit.life.update_nothing()
        if units:
            self._pipeline.updates.kernel = update
            self._pipeline.advance()
