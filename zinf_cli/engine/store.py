"""Where each unit's bytes live: extents on tiers, and the model's parameters bound to flats while a unit is held.

A parameter of a unit that is not held keeps its shape and dtype but shares one NaN element: code that looks at
`weight.dtype` still works, and code that computes with it outside of its unit shows at once instead of silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.units import FlatLayout, ParamLayout, UnitLayout
from zinf_cli.tiers.arena import Arena
from zinf_cli.tiers.tier import Extent, Tier

OPTIMIZER_FIELDS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TierSet:
    """The tier of each class of state."""

    params: Tier
    grads: Tier
    optimizer: Tier
    activations: Tier


class Unit:
    """A unit at run time: its layout, the model's parameters, and this rank's slices on their tiers."""

    def __init__(self, layout: UnitLayout, model: nn.Module, tiers: TierSet, ranks: Ranks, dtype: torch.dtype) -> None:
        self.layout = layout
        self.name = layout.name
        self.dtype = dtype
        self.ranks = ranks
        self._tiers = tiers
        by_name = dict(model.named_parameters())
        self._params = [[by_name[p.name] for p in flat.params] for flat in layout.flats]
        self.buffers = [buffer for path in layout.modules for buffer in model.get_submodule(path).buffers()]
        self._placeholders = [
            [torch.full((1,), math.nan, dtype=dtype, device=p.device).expand(p.shape) for p in params]
            for params in self._params
        ]
        trainable = layout.trainable
        self.homes: list[dict[str, Extent]] = []
        """Places of its own for what an update changes: "params" and each optimizer field. With speculative updates
        (eager.py) there are two, for two versions."""
        if trainable is not None:
            self.add_home()
        self.at = dict(self.homes[0]) if self.homes else {}
        """Where that lies now: at home, or in a checkpoint that the last update went into (capture.py)."""
        self.proposed: dict[str, Extent] | None = None
        """Where an update has put it of which nobody knows yet whether it holds (eager.py)."""
        self.frozen: list[Extent] = [
            tiers.params.allocate(flat.slice_numel * dtype.itemsize, f"{self.name} params")
            for flat in layout.flats
            if not flat.trainable
        ]
        self.grad: Extent | None = None
        num_trainable = len(trainable.params) if trainable is not None else 0
        self.steps = [0] * num_trainable
        """Updates of each trainable parameter so far."""
        self.touched = [False] * num_trainable
        """Which of them got a gradient in this step; the others are not updated."""
        if trainable is not None:
            self.grad = tiers.grads.allocate(trainable.slice_numel * 4, f"{self.name} grads")
            for number, param in enumerate(self._params[0]):
                param.register_post_accumulate_grad_hook(self._touch(number))
        self.backwards = 0
        """Backward visits of this step whose gradient has been handed to its tier."""
        self.grad_ready = False
        """The gradient of a whole step is on its tier, or on its way there."""
        self.update_due = False
        """The gradient of a whole step is computed (if not yet ready), and no fetch has taken its update on."""
        self.updating = False
        """A fetch has taken the update on, and the parameters on the tier are still the old ones."""
        self.release()

    def add_home(self) -> None:
        """Room for one version of what an update changes."""
        layout, tiers = self.layout.trainable, self._tiers
        if layout is None:
            return
        home = {"params": tiers.params.allocate(layout.slice_numel * self.dtype.itemsize, f"{self.name} params")}
        for field in OPTIMIZER_FIELDS if self.dtype == torch.float32 else (*OPTIMIZER_FIELDS, "master"):
            home[field] = tiers.optimizer.allocate(layout.slice_numel * 4, f"{self.name} {field}")
        self.homes.append(home)

    def places(self, *, keep: bool) -> dict[str, Extent]:
        """Where an update goes: into a home, which is another one if the present version is to be kept."""
        places = {}
        for name, now in self.at.items():
            homes = [home[name] for home in self.homes]
            others = [home for home in homes if home is not now]
            places[name] = now if not keep and len(others) < len(homes) else others[0]
        return places

    @property
    def slices(self) -> list[Extent]:
        """This rank's slice of each flat, where it lies now."""
        return [*([self.at["params"]] if self.at else []), *self.frozen]

    @property
    def optimizer(self) -> dict[str, Extent]:
        """The optimizer's fields of the trainable slice, where they lie now."""
        return {name: extent for name, extent in self.at.items() if name != "params"}

    @property
    def params(self) -> list[nn.Parameter]:
        """The model's parameters, trainable ones first."""
        return [param for params in self._params for param in params]

    def take_update(self) -> bool:
        """Whether an update is due; the caller does it."""
        due, self.update_due = self.update_due, False
        self.updating |= due
        return due

    def count_update(self, by: int = 1) -> None:
        """One more update of each parameter that got a gradient (or one less, where it did not hold)."""
        self.steps = [step + by * touched for step, touched in zip(self.steps, self.touched, strict=True)]

    def _touch(self, number: int) -> Callable[[torch.Tensor], None]:
        def touch(_: torch.Tensor) -> None:
            self.touched[number] = True

        return touch

    def in_place(self) -> list[torch.Tensor] | None:
        """The flats themselves, where they lie whole in memory the compute device can use."""
        if self.ranks.world_size > 1:
            return None
        views = [extent.view() for extent in self.slices]
        if any(view is None for view in views):
            return None
        return [view.view(self.dtype) for view in views if view is not None]

    def bind(self, flats: Sequence[torch.Tensor]) -> None:
        """Let the model's parameters be views of `flats` (one per layout flat, 1-D, the compute dtype)."""
        for layout, params, flat in zip(self.layout.flats, self._params, flats, strict=True):
            for place, param in zip(layout.params, params, strict=True):
                param.data = place.view(flat)

    def bind_grads(self, flat: torch.Tensor) -> None:
        """Let `p.grad` of the trainable parameters be views of `flat` (fp32, 1-D); needs bound parameters."""
        assert self.layout.trainable is not None
        for place, param in zip(self.layout.trainable.params, self._params[0], strict=True):
            param.grad = place.view(flat)

    def release(self) -> None:
        """Unbind: nothing of the model points into a slot any more."""
        for params, placeholders in zip(self._params, self._placeholders, strict=True):
            for param, placeholder in zip(params, placeholders, strict=True):
                param.grad = None
                param.data = placeholder

    def fill(self, read: Callable[[Sequence[str]], Mapping[str, torch.Tensor]], arena: Arena) -> None:
        """Take the parameters' values from `read(names)`, keep this rank's slice; memory is one unit's."""
        values = read([param.name for param in self.layout.params()])
        for layout, extent in zip(self.layout.flats, self.slices, strict=True):
            self._store(layout, extent, values, self.dtype, arena)
            if layout.trainable and "master" in self.optimizer:
                self._store(layout, self.optimizer["master"], values, torch.float32, arena)

    def _store(
        self,
        layout: FlatLayout,
        extent: Extent,
        values: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        arena: Arena,
    ) -> None:
        """Write this rank's slice of a flat of `values` to `extent`, in `dtype`."""
        begin = self.ranks.rank * layout.slice_numel
        memory = extent.view()
        buffer = None
        if memory is None:
            buffer = arena.allocate(extent.num_bytes)
            assert buffer is not None, "the arena holds more than one slice when nothing else is in it"
            memory = buffer.data.zero_()
        own = memory.view(dtype)
        for place in layout.params:
            first, last = overlap(place, begin, begin + layout.slice_numel)
            if first < last:
                piece = values[place.name].reshape(-1)[first - place.offset : last - place.offset]
                own[first - begin : last - begin].copy_(piece)
        if buffer is not None:
            extent.write(0, buffer.data).wait()
            buffer.free()


def overlap(place: ParamLayout, begin: int, end: int) -> tuple[int, int]:
    """The part of [begin, end) of a flat that belongs to the parameter at `place` (empty when first >= last)."""
    return max(begin, place.offset), min(end, place.offset + place.numel)


def to_placeholders(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replace every parameter (on the meta device) by an empty-storage one of `dtype` on `device`, tied ones tied.

    A meta parameter's `.data` can't become real memory, so the module gets a fresh Parameter object.
    """
    fresh: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in fresh:
                data = torch.full((1,), math.nan, dtype=dtype, device=device).expand(old.shape)
                new = nn.Parameter(data, requires_grad=old.requires_grad)
                if dtype != torch.float32:
                    new.grad_dtype = torch.float32
                fresh[id(old)] = new
                fresh[id(new)] = new
            module._parameters[name] = fresh[id(old)]
