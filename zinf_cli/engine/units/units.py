"""Units: what is fetched, computed and freed together, and how its parameters lie in flat buffers.

A unit is an element of one of the model's outermost module lists (a transformer block), or a leaf module outside of
them that is worth streaming (an embedding, the head). Modules that share a parameter share one unit. What belongs to
none (a final norm, a bare parameter of the root) forms the resident unit, which is held for the whole step.

A unit has a flat for its trained parameters and one for its frozen ones. Where a model keeps some of them in another
dtype than the rest (a router in fp32 among bf16), each dtype has flats of its own. So have frozen ones that lie packed
on their tier (engine/packed.py), and hidden matrices that an optimizer updates whole. Every parameter starts at a
multiple of ALIGN elements, so that kernels see the alignment that torch's allocator gives, and no block of elements
with one scale has two parameters. A flat is padded so that it cuts into world_size equal slices, each of whole pages in
any dtype of parameters.

A block that is larger than a part may be is taken apart: its own modules become units, down to single matrices, and
tiles of them (tiles.py). Norms and biases of such a block are resident.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from zinf_cli.engine.units.origins import experts_of, packings_of, parts_of, shapes_of, updated_whole
from zinf_cli.engine.units.tiles import Part, Tile
from zinf_cli.model_state import SCALE_BLOCK, SLICE_MULTIPLE, factors_of, packed_bytes

ALIGN = SCALE_BLOCK
RESIDENT = "resident"


@dataclass(frozen=True)
class ParamLayout:
    """One parameter inside a flat: `numel` elements from element `offset`."""

    name: str
    index: int
    """The place of its origin in model.parameters() before the model was cut: it orders the norms of gradients."""
    shape: torch.Size
    offset: int
    bounds: tuple[float | None, float | None] | None = None
    """Least and most that the model's own forward lets it be (written_weights.py)."""
    part: Part | None = None
    """Where it lies in a larger parameter, if it is a tile of one."""
    packs_experts: bool = False
    """Whether it has a matrix for each of some experts, and the model computes them one after another."""

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def origin(self) -> str:
        """The parameter in the model as it was before it was cut: what a checkpoint knows it by."""
        return self.name if self.part is None else self.part.name

    @property
    def first(self) -> int:
        """The element of it with which this one begins."""
        return 0 if self.part is None else self.part.first

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The parameter's own shape, as a view of a whole flat."""
        return flat[self.offset : self.offset + self.numel].view(self.shape)


@dataclass(frozen=True)
class FlatLayout:
    """Parameters side by side. `numel` is divisible by world_size × SLICE_MULTIPLE."""

    params: tuple[ParamLayout, ...]
    trainable: bool
    dtype: torch.dtype
    """Of the parameters as the model computes with them."""
    numel: int
    slice_numel: int
    packing: str | None = None
    """How they lie on their tier and travel between ranks, a name of PACKINGS; None: in their dtype."""

    whole: bool = False
    """Whether it has hidden matrices that the optimizer updates whole (`OptimizerState.whole`)."""

    @cached_property
    def factors(self) -> tuple[tuple[tuple[int, int], ...], int]:
        """Of a factored field: first and last value of each parameter's, and the number of all with padding."""
        return factors_of([place.shape for place in self.params])

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameters as the model computes with them, the slices of all ranks together."""
        return self.numel * self.dtype.itemsize

    @property
    def moved_bytes(self) -> int:
        """Bytes of the parameters as they lie on their tier, the slices of all ranks together."""
        if self.packing is None:
            return self.num_bytes
        return self.numel // self.slice_numel * packed_bytes(self.packing, self.slice_numel)

    def slice_of(self, flat: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's slice, as a view of a whole flat (1-D)."""
        return flat[rank * self.slice_numel : (rank + 1) * self.slice_numel]


@dataclass(frozen=True)
class UnitLayout:
    """A unit by name: module paths, and the flats of their parameters: trainable first, narrow dtypes first."""

    name: str
    """The path of its first module; of a tile, the path of the module that was cut, and which of its tiles it is."""
    modules: tuple[str, ...]
    flats: tuple[FlatLayout, ...]

    @property
    def resident(self) -> bool:
        return self.name == RESIDENT

    @property
    def on_demand(self) -> bool:
        """Whether it is some of a layer's experts, which only the tokens that are routed to them call."""
        return any(place.part is not None and len(place.part.shape) > 2 for place in self.params())

    @property
    def trainable(self) -> tuple[FlatLayout, ...]:
        """The flats of trained parameters."""
        return tuple(flat for flat in self.flats if flat.trainable)

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameters, the slices of all ranks together."""
        return sum(flat.num_bytes for flat in self.flats)

    def params(self) -> Iterator[ParamLayout]:
        """The parameters of all flats, in the order of the flats."""
        for flat in self.flats:
            yield from flat.params


def discover(
    model: nn.Module, world_size: int, demoted: frozenset[str] = frozenset(), most: int | None = None
) -> tuple[UnitLayout, ...]:
    """The units of a model (any device, meta included), in module order; the resident unit last, if there is one.

    `demoted` names modules whose parameters are used outside of their own forward: they become resident. A block of
    more than `most` elements is taken apart.
    """
    groups = _merge_shared([(name, module) for name, module in _candidates(model, most) if name not in demoted])
    make = _Flats(model, world_size)
    taken: dict[int, int] = {}
    for number, group in enumerate(groups):
        for _, module in group:
            taken.update((id(param), number) for param in module.parameters())
    for param in _params_outside(model, {id(m) for group in groups for _, m in group}):
        taken.pop(id(param), None)  # a module outside of every unit owns it, too: it is held for the whole step

    units = []
    for number, group in enumerate(groups):
        params = [p for p in model.parameters() if taken.get(id(p)) == number]
        if params:
            paths = tuple(name for name, _ in group)
            units.append(UnitLayout(_name(model, paths[0]), paths, make.of(params)))
    rest = [p for p in model.parameters() if id(p) not in taken]
    if rest:
        units.append(UnitLayout(RESIDENT, (), make.of(rest)))
    return tuple(units)


def _name(model: nn.Module, path: str) -> str:
    tiles, _, number = path.rpartition(".")
    if not isinstance(model.get_submodule(path), Tile):
        return path
    owner, count = tiles.rpartition(".")[0], len(list(model.get_submodule(tiles).children()))
    return f"{owner} {int(number) + 1}/{count}" if count > 1 else owner


def _candidates(model: nn.Module, most: int | None) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of list elements and of leaf modules with a weight of two or more dimensions."""

    def walk(path: str, module: nn.Module, *, in_list: bool) -> Iterator[tuple[str, nn.Module]]:
        is_list = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        has_children = any(True for _ in module.children())
        too_large = most is not None and sum(param.numel() for param in module.parameters()) > most
        if is_list or (has_children and (too_large or not in_list)):
            for name, child in module.named_children():
                yield from walk(f"{path}.{name}" if path else name, child, in_list=is_list)
        elif in_list or any(param.dim() >= 2 for param in module.parameters(recurse=False)):
            yield path, module

    seen: set[int] = set()
    for path, module in walk("", model, in_list=False):
        if path and id(module) not in seen and any(True for _ in module.parameters()):
            seen.add(id(module))
            yield path, module


def _merge_shared(candidates: Sequence[tuple[str, nn.Module]]) -> list[list[tuple[str, nn.Module]]]:
    """Group the candidates that share a parameter (a tied embedding and head)."""
    groups: list[list[tuple[str, nn.Module]]] = []
    group_of: dict[int, list[tuple[str, nn.Module]]] = {}
    for candidate in candidates:
        group = [candidate]
        groups.append(group)
        for param in candidate[1].parameters():
            other = group_of.get(id(param))
            if other is not None and other is not group:
                other.extend(group)
                groups = [g for g in groups if g is not group]
                for key, value in group_of.items():
                    if value is group:
                        group_of[key] = other
                group = other
            group_of[id(param)] = group
    return groups


def _params_outside(model: nn.Module, unit_modules: set[int]) -> Iterator[nn.Parameter]:
    def walk(module: nn.Module) -> Iterator[nn.Parameter]:
        if id(module) in unit_modules:
            return
        yield from module.parameters(recurse=False)
        for child in module.children():
            yield from walk(child)

    yield from walk(model)


class _Flats:
    """Lays the parameters of a model out in flats."""

    def __init__(self, model: nn.Module, world_size: int) -> None:
        self._names = {id(param): name for name, param in model.named_parameters()}
        self._order = {name: index for index, name in enumerate(shapes_of(model))}
        self._parts = parts_of(model)
        self._experts = experts_of(model)
        self._packings = packings_of(model)
        self._whole = updated_whole(model)
        self._multiple = world_size * SLICE_MULTIPLE
        self._world_size = world_size

    def of(self, params: Sequence[nn.Parameter]) -> tuple[FlatLayout, ...]:
        """The flats of a unit that has `params`."""
        kinds: dict[tuple[bool, int, str, str, bool], list[nn.Parameter]] = {}
        for param in params:
            frozen, whole = not param.requires_grad, self._origin(param) in self._whole
            packing = (self._packing(param) if frozen else None) or ""
            kind = (frozen, param.dtype.itemsize, str(param.dtype), packing, whole and not frozen)
            kinds.setdefault(kind, []).append(param)
        return tuple(
            self._flat(alike, trainable=not frozen, packing=packing or None, whole=whole)
            for (frozen, _, _, packing, whole), alike in sorted(kinds.items(), key=lambda item: item[0])
        )

    def _flat(self, params: Sequence[nn.Parameter], *, trainable: bool, packing: str | None, whole: bool) -> FlatLayout:
        layouts = []
        offset = 0
        for param in params:
            layouts.append(self._layout(param, offset))
            offset += -(-param.numel() // ALIGN) * ALIGN
        numel = max(1, -(-offset // self._multiple)) * self._multiple
        each = numel // self._world_size
        return FlatLayout(tuple(layouts), trainable, params[0].dtype, numel, each, packing, whole)

    def _packing(self, param: nn.Parameter) -> str | None:
        packing = self._packings.get(self._origin(param))
        return None if (packing, param.dtype) == ("bf16", torch.bfloat16) else packing

    def _origin(self, param: nn.Parameter) -> str:
        """Its name in the model as it was before it was cut."""
        part = self._parts.get(id(param))
        return self._names[id(param)] if part is None else part.name

    def _layout(self, param: nn.Parameter, offset: int) -> ParamLayout:
        name, part, index = self._names[id(param)], self._parts.get(id(param)), self._order[self._origin(param)]
        return ParamLayout(name, index, param.shape, offset, part=part, packs_experts=id(param) in self._experts)
