"""Where each unit's bytes live: extents on tiers, and the model's parameters bound to flats while a unit is held.

A parameter of a unit that is not held is a *placeholder*: it keeps its shape and dtype, and all its elements are one
NaN. So code that asks for `weight.dtype` works, and code that computes with the weight outside of its unit gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import torch
from torch import nn

from zinf_cli.engine.packed import unpack
from zinf_cli.engine.precision import STORED, STORED_NAMES
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.units.life import FlatLife, Life
from zinf_cli.engine.units.tiles import move_tiled
from zinf_cli.engine.units.units import FlatLayout, ParamLayout, UnitLayout
from zinf_cli.model_state import (
    BLOCK_NUMEL,
    DEVICE_BLOCK_NUMEL,
    FP32_BYTES,
    GRAD,
    PARAM,
    REMAINDER,
    SCALED,
    Field,
    OptimizerState,
    bytes_of,
    packed_bytes,
)
from zinf_cli.tiers.streams import streams_of
from zinf_cli.tiers.tier import Extent, Tier, Transfer


@dataclass(frozen=True)
class TierSet:
    """The tier of each class of state."""

    params: Tier
    grads: Tier
    optimizer: Tier
    activations: Tier


class Flat:
    """A flat at run time: the model's parameters in it, and this rank's slice of each of its fields on their tiers.

    The fields are the parameters themselves and, of a trainable flat, what `optimizer` keeps beside them.
    """

    def __init__(
        self,
        unit: str,
        number: int,
        layout: FlatLayout,
        model: nn.Module,
        tiers: TierSet,
        ranks: Ranks,
        optimizer: OptimizerState,
    ) -> None:
        self.unit = unit
        self.number = number
        """Its place in the unit."""
        self.layout = layout
        self.dtype = layout.dtype
        self.rank = ranks.rank
        dtype = STORED_NAMES.get(layout.dtype, "F32")  # what is not a real number has no master either
        kept = optimizer.of(whole=layout.whole)
        self.beside = kept.beside(dtype) if layout.trainable else ()
        """The fields of the optimizer."""
        self.stored = kept.stored(dtype) if layout.trainable else optimizer.frozen
        """The fields that are state between two steps, in a checkpoint's order."""
        self.moments = kept.fields if layout.trainable else ()
        """What the optimizer keeps, in the order of its kernel."""
        self.scaled = any(field.dtype == SCALED for field in self.moments)
        """Whether that lies in chunks of CHUNK_NUMEL elements (eight_bits.py)."""
        self.carrier = kept.carrier if REMAINDER in self.beside else None
        """The field whose sign is that of masters which are split (split_masters.py)."""
        self._tiers = tiers
        self._class_of = optimizer.class_of if layout.trainable else attrgetter("state")
        by_name = dict(model.named_parameters())
        self.params: list[nn.Parameter] = [by_name[place.name] for place in layout.params]
        self._placeholders = [placeholder(p.shape, self.dtype, p.device) for p in self.params]
        self.grad_dtype = torch.float32
        """Of the gradient that was last written to its tier."""
        self.homes: list[dict[str, Extent]] = []
        """Extents of its own for each field. With speculative updates (eager.py) there are two sets of them: the flat
        lies in one, and the other is its shadow."""
        self.add_home()
        self.life = FlatLife(self.homes[0], len(self.params))
        self.grad: Extent | None = None
        if layout.trainable:
            self.grad = self._allocate(GRAD)
            for place, param in enumerate(self.params):
                param.register_post_accumulate_grad_hook(partial(self.touch, place))

    def add_home(self) -> None:
        """Allocate extents for one version of all fields."""
        self.homes.append({field.name: self._allocate(field) for field in (PARAM, *self.beside)})

    def _allocate(self, field: Field) -> Extent:
        tier: Tier = getattr(self._tiers, self._class_of(field))
        return tier.allocate(self.num_bytes(field, self.layout.slice_numel), f"{self.unit} {field.name}")

    def dtype_of(self, field: Field) -> torch.dtype:
        """The dtype in which a field of this flat lies on its tier."""
        if field is GRAD:
            return self.grad_dtype
        if field.dtype == SCALED or self._is_packed(field):
            return torch.uint8
        return self.dtype if field.dtype is None else STORED[field.dtype]

    def num_bytes(self, field: Field, numel: int) -> int:
        """Bytes of `numel` elements of a field, from a cut between chunks on; of a factored one, all or none."""
        if field.factored:
            return self.layout.factors[1] * FP32_BYTES if numel else 0
        if self.layout.packing is not None and self._is_packed(field):
            return packed_bytes(self.layout.packing, numel)
        return bytes_of(SCALED, numel) if field.dtype == SCALED else numel * self.dtype_of(field).itemsize

    def _is_packed(self, field: Field) -> bool:
        return self.layout.packing is not None and field.name == PARAM.name

    def next_home(self, *, speculative: bool) -> dict[str, Extent]:
        """The extents that the next update writes, by name of the field.

        A speculative update keeps the present version, and so writes the other extents. Any other update writes in
        place, or from a checkpoint back home.
        """
        places = {}
        for name, now in self.at.items():
            homes = [home[name] for home in self.homes]
            others = [home for home in homes if home is not now]
            places[name] = now if not speculative and len(others) < len(homes) else others[0]
        return places

    @property
    def at(self) -> Mapping[str, Extent]:
        """Where each field lies now."""
        return self.life.at

    @property
    def steps(self) -> Sequence[int]:
        """Updates of each parameter so far."""
        return self.life.steps

    @property
    def touched(self) -> Sequence[bool]:
        """Which parameters got a gradient in this step; the others are not updated."""
        return self.life.touched

    @property
    def slice(self) -> Extent:
        """This rank's slice of the parameters, where it lies now."""
        return self.at[PARAM.name]

    def slice_in_place(self) -> torch.Tensor | None:
        """The same (1-D, the flat's dtype, or packed: uint8), if it lies in memory of the compute device; else None."""
        memory = self.slice.view()
        return None if memory is None else memory.view(self.dtype_of(PARAM))

    def unpack(self, data: torch.Tensor, into: torch.Tensor) -> None:
        """Fill a whole flat `into` (1-D, the flat's dtype) with what `data` (uint8) has of all ranks, packed."""
        packing = self.layout.packing
        assert packing is not None
        ranks = into.numel() // self.layout.slice_numel
        block = BLOCK_NUMEL if streams_of(into.device).on_cpu else DEVICE_BLOCK_NUMEL
        for packed, values in zip(data.chunk(ranks), into.chunk(ranks), strict=True):
            unpack(packed, packing, values, block)

    def bind(self, flat: torch.Tensor) -> None:
        """Let the model's parameters be views of `flat` (1-D, the flat's dtype)."""
        for place, param in zip(self.layout.params, self.params, strict=True):
            param.data = place.view(flat)

    def hold_to_bounds(self) -> None:
        """Clamp the bound parameters to their bounds, as the forward did with its copy (written_weights.py)."""
        for place, param in zip(self.layout.params, self.params, strict=True):
            if place.bounds is not None:
                param.data.clamp_(*place.bounds)

    def bind_grads(self, flat: torch.Tensor) -> None:
        """Let `p.grad` of the parameters be views of `flat` (fp32, 1-D); needs bound parameters."""
        for place, param in zip(self.layout.params, self.params, strict=True):
            param.grad = place.view(flat)

    def unbind(self) -> None:
        """Let nothing of the model point into a slot any more."""
        for param, placeholder in zip(self.params, self._placeholders, strict=True):
            param.grad = None
            param.data = placeholder

    def touch(self, place: int, _: torch.Tensor | None = None) -> None:
        """The parameter at `place` has got a gradient."""
        self.life.touch(place)


class Unit:
    """A unit at run time: its flats and its life."""

    def __init__(
        self, layout: UnitLayout, model: nn.Module, tiers: TierSet, ranks: Ranks, optimizer: OptimizerState
    ) -> None:
        self.layout = layout
        self.name = layout.name
        self.ranks = ranks
        self.flats = [
            Flat(layout.name, number, flat, model, tiers, ranks, optimizer) for number, flat in enumerate(layout.flats)
        ]
        self.trained = [flat for flat in self.flats if flat.layout.trainable]
        """The trainable ones, which come first in `flats`."""
        self.unstored = [flat for flat in self.flats if not flat.stored]
        """Those that no checkpoint holds."""
        self.life = Life(layout.name, [flat.life for flat in self.trained])
        self.buffers = [buffer for path in layout.modules for buffer in model.get_submodule(path).buffers()]
        self.unbind()

    @property
    def params(self) -> list[nn.Parameter]:
        """The model's parameters, trainable ones first."""
        return [param for flat in self.flats for param in flat.params]

    def add_shadow(self) -> None:
        """Allocate a shadow for every trained flat: speculative updates write there."""
        for flat in self.trained:
            flat.add_home()

    @property
    def has_shadow(self) -> bool:
        """Whether some flat has a shadow, so that the unit may be updated speculatively."""
        return any(len(flat.homes) > 1 for flat in self.trained)

    def in_place(self) -> list[torch.Tensor | None]:
        """The flats (1-D, each of its dtype) where they lie, if that is whole in memory of the compute device.

        None for one that lies elsewhere or packed, and for all with more than one rank.
        """
        alone = self.ranks.world_size == 1
        return [flat.slice_in_place() if alone and flat.layout.packing is None else None for flat in self.flats]

    @property
    def changes_in_place(self) -> bool:
        """Whether an update changes, or a backward clears, something in memory of the compute device."""
        extents = (extent for flat in self.trained for extent in (*flat.at.values(), flat.grad))
        return any(extent is not None and extent.view() is not None for extent in extents)

    def grads_in_place(self) -> list[torch.Tensor] | None:
        """This rank's slices of the gradient (fp32, 1-D), if they lie in memory of the compute device; else None."""
        views = [flat.grad.view() for flat in self.trained if flat.grad is not None]
        if any(view is None for view in views):
            return None
        return [view.view(torch.float32) for view in views if view is not None]

    def write_grads(self, own: Sequence[torch.Tensor]) -> list[Transfer]:
        """Start writing this rank's slices of the gradient (`own`: 1-D, fp32 or narrowed) to their tier, unless they
        lie there."""
        writes = []
        for flat, values in zip(self.trained, own, strict=True):
            assert flat.grad is not None
            if flat.grad.view() is None:
                flat.grad_dtype = values.dtype
                writes.append(flat.grad.write(0, values.view(torch.uint8)))
        return writes

    def bind(self, flats: Sequence[torch.Tensor]) -> None:
        """Let the model's parameters be views of `flats` (1-D, one per flat, each of its dtype)."""
        for flat, values in zip(self.flats, flats, strict=True):
            flat.bind(values)

    @property
    def clamped(self) -> bool:
        """Whether a forward clamps one of its parameters."""
        return any(place.bounds is not None for flat in self.flats for place in flat.layout.params)

    def hold_to_bounds(self) -> None:
        """Clamp the bound parameters that a forward clamps."""
        for flat in self.flats:
            flat.hold_to_bounds()

    def bind_grads(self, grads: Sequence[torch.Tensor]) -> None:
        """Let `p.grad` of the trainable parameters be views of `grads` (fp32, 1-D, one per trainable flat)."""
        for flat, grad in zip(self.trained, grads, strict=True):
            flat.bind_grads(grad)

    def unbind(self) -> None:
        """Let nothing of the model point into a slot any more."""
        for flat in self.flats:
            flat.unbind()


def overlap(place: ParamLayout, begin: int, end: int) -> tuple[int, int]:
    """The part of [begin, end) of a flat that belongs to the parameter at `place` (empty when first >= last)."""
    return max(begin, place.offset), min(end, place.offset + place.numel)


def placeholder(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of one element: NaN, so that a read of it shows, or the least integer."""
    value: float = math.nan
    if not (dtype.is_floating_point or dtype.is_complex):
        value = 0 if dtype is torch.bool else torch.iinfo(dtype).min
    return torch.full((), value, dtype=dtype, device=device).expand(shape)


def to_placeholders(model: nn.Module, device: torch.device) -> None:
    """Replace every parameter (on the meta device) by a placeholder on `device`; tied ones stay tied.

    A meta parameter's `.data` can't become real memory, so the module gets a new Parameter object. A 16-bit parameter
    has a gradient in fp32. On an accelerator autograd adds what a call gives to that as it is, without an fp32 copy of
    it: 10 bytes of memory traffic for a parameter, and not 18. If one call uses a weight twice, the two gradients are
    then added in 16 bits first, as in plain PyTorch.
    """
    wider = torch.float32 if streams_of(device).on_cpu else None
    fresh: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in fresh:
                data = placeholder(old.shape, old.dtype, device)
                new = nn.Parameter(data, requires_grad=old.requires_grad)
                if old.dtype != torch.float32:
                    new.grad_dtype = wider
                fresh[id(old)] = new
                fresh[id(new)] = new
            module._parameters[name] = fresh[id(old)]
    move_tiled(model, device)
