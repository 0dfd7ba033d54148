"""State that layers hand to each other inside objects: tensors there are inputs, what a call leaves there is output."""

from __future__ import annotations

from collections import UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from plain import everything_on
from zinf_cli.engine.compute.survey import survey
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.ranks import Ranks
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.errors import ModelError

WIDTH, STEPS, LR = 32, 4, 1e-2
MIB = 2**20


class OwnDict(dict):  # type: ignore[type-arg]
    """pytree opens dict, and no class made of it."""


class Pair(tuple):  # type: ignore[type-arg]
    """No tuple to pytree."""


class Slots:
    __slots__ = ("first", "later")


@dataclass
class Layers:
    parts: list[Any] = field(default_factory=list)


Share = Callable[[Any, int, torch.Tensor], torch.Tensor]
"""(object, number of the layer, what it has made) to what it goes on with."""


def in_dict(shared: Any, number: int, x: torch.Tensor) -> Any:
    if number == 0:
        shared["states"] = (x * 2, x.tanh())
        return x
    return x + shared["states"][0] * shared["states"][1]


def in_attribute(shared: Any, number: int, x: torch.Tensor) -> Any:
    before = getattr(shared, "first", None)
    shared.first = x if before is None else before + x.sin()
    return x if before is None else x * before


def appended(shared: Any, number: int, x: torch.Tensor) -> Any:
    parts = shared.parts if isinstance(shared, Layers) else shared
    parts.append(x.sigmoid())
    return x + sum(parts)


def returned_in_object(_: Any, number: int, x: torch.Tensor) -> Any:
    """The class of a result is the layer's own, too, and it may hold one tensor twice."""
    return SimpleNamespace(hidden=x, states=[OwnDict(first=x, more=(x.cos(), number))])


def in_object_within(shared: Any, number: int, x: torch.Tensor) -> Any:
    """As a cache has it: an object of the layer, made by the call, which later layers read and replace parts of."""
    if number == 0:
        shared["layers"] = [SimpleNamespace(keys=x.cos(), count=1)]
    layer = shared["layers"][0]
    layer.keys = torch.cat([layer.keys, x])[-x.shape[0] :] * 0.5 + layer.keys * 0.5
    layer.count += 1
    return x + layer.keys * layer.count


def in_dict_in_tuple(shared: Any, number: int, x: torch.Tensor) -> Any:
    shared.append(Pair((x.sin(), {"factor": x.cos()})))
    return x + sum(value * beside["factor"] for value, beside in shared)


class Sum:
    def __init__(self) -> None:
        self.total: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> torch.Tensor:
        self.total = x.sin() if self.total is None else self.total + x
        return self.total


def in_bound_method(shared: Any, number: int, x: torch.Tensor) -> Any:
    add = shared.setdefault("add", Sum().add)
    return x + add(x)


def in_closure(shared: Any, number: int, x: torch.Tensor) -> Any:
    if number == 0:
        first = x.sin()
        shared["apply"] = lambda z: z * first
        return x
    return x + shared["apply"](x)


def in_partial(shared: Any, number: int, x: torch.Tensor) -> Any:
    if number == 0:
        shared["apply"] = partial(torch.add, x.sin(), alpha=2)
        shared["named"] = partial(torch.where, x.detach() > 0, other=x.cos())
        return x
    return shared["apply"](x) + shared["named"](x)


CASES: dict[str, tuple[Callable[[], Any], Share]] = {
    "dict": (dict, in_dict),
    "a class of dict": (OwnDict, in_dict),
    "UserDict": (UserDict, in_dict),
    "attribute": (SimpleNamespace, in_attribute),
    "slots": (Slots, in_attribute),
    "list": (list, appended),
    "deque": (deque, appended),
    "list in a dataclass": (Layers, appended),
    "object within": (OwnDict, in_object_within),
    "dict in a tuple": (list, in_dict_in_tuple),
    "bound method": (dict, in_bound_method),
    "closure": (dict, in_closure),
    "partial": (dict, in_partial),
    "object returned": (dict, returned_in_object),
}


class Layer(nn.Module):
    def __init__(self, number: int, share: Share) -> None:
        super().__init__()
        self.number, self.share = number, share
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, shared: Any) -> torch.Tensor:
        return self.share(shared, self.number, torch.tanh(self.linear(x)))


class Model(nn.Module):
    def __init__(self, make: Callable[[], Any], share: Share) -> None:
        super().__init__()
        self.make = make
        self.layers = nn.ModuleList(Layer(number, share) for number in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.make()
        for layer in self.layers:
            x = layer(x, shared)
            x = getattr(x, "hidden", x)
        return x.square().mean()


def weights(name: str, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode()))) * 0.3


def batch(step: int, number: int) -> torch.Tensor:
    return torch.randn((3, WIDTH), generator=torch.Generator().manual_seed(10 * step + number))


def plain(make: Callable[[], Any], share: Share) -> list[float]:
    model = Model(make, share)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(weights(name, param.shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        for number in range(2):
            loss = model(batch(step, number))
            (loss / 2).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def engine_of(make: Callable[[], Any], share: Share, folder: Path, *, keep: bool) -> Engine:
    model = Model(make, share).to("meta")
    seen = survey(model, partial(model, torch.zeros((3, WIDTH), device="meta")), 1)
    options = replace(
        everything_on("nvme", folder), nvme_bytes=8 * MIB, slot_bytes=2 * MIB, resident_bytes=MIB, chunk_numel=4096,
        num_chunks=16, staging_bytes=2 * MIB, kept_units=frozenset(seen.order if keep else ()),
    )  # fmt: skip
    engine = Engine(model, seen.units, options, Ranks(), order=seen.order)
    shapes = {name: param.shape for name, param in model.named_parameters()}
    engine.load(lambda names: {name: weights(name, shapes[name]) for name in names})
    return engine


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_layers_that_share_state_learn_as_in_plain_pytorch(case: str, keep: bool, tmp_path: Path) -> None:
    engine = engine_of(*CASES[case], tmp_path, keep=keep)
    losses: list[float] = []
    for step in range(STEPS):
        work = [MicroBatch(partial(engine.model, batch(step, number)), 0.5, number) for number in range(2)]
        losses += engine.train_step(work, AdamW(LR), max_grad_norm=None, more=step + 1 < STEPS).losses
    engine.close()
    assert losses == pytest.approx(plain(*CASES[case]), rel=1e-5)


def test_a_tensor_that_is_changed_in_place_inside_an_object_is_refused(tmp_path: Path) -> None:
    def in_place(shared: Any, number: int, x: torch.Tensor) -> Any:
        if number == 0:
            shared["sum"] = x.detach().clone()
        else:
            shared["sum"].add_(x.detach())
        return x * shared["sum"]

    engine = engine_of(OwnDict, in_place, tmp_path, keep=False)
    with pytest.raises(ModelError, match="changes its input in place"):
        engine.train_step([MicroBatch(partial(engine.model, batch(0, 0)), 1.0, 0)], AdamW(LR), max_grad_norm=None)
    engine.close()
