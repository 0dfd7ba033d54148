"""A unit that computes something else when it runs again is refused, whatever makes it differ; or it is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from blocks import MODES, Block, Blocks, Mode, assert_exact
from zinf_cli.engine.compute.recompute import compare, some_of
from zinf_cli.errors import ModelError


class ChangesItsInput(Block):
    def forward(self, x: torch.Tensor) -> Any:
        x.data += 1
        return x + torch.tanh(self.linear(x))


class AsksOfItsInput(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return x + torch.tanh(self.linear(x)) * (2 if x.requires_grad else 1)


class AsksTheMode(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return x + torch.tanh(self.linear(x)) * (2 if torch.is_grad_enabled() else 1)


class TakesTurns(Block):
    """With an argument that no tensor is in."""

    def forward(self, x: torch.Tensor, given: Any = None) -> Any:
        if isinstance(given, torch.Generator):
            return x + torch.tanh(self.linear(x)) * torch.rand((), generator=given)
        if isinstance(given, Iterator):
            return x + torch.tanh(self.linear(x)) * next(given)
        if given is not None:
            given += 1
            return x + torch.tanh(self.linear(x)) * float(given[0])
        return x + torch.tanh(self.linear(x))


class Giving(Blocks):
    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__(TakesTurns)
        self.make = make

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = self.make()
        for layer in self.layers:
            x = layer(x, given)
        return x.square().mean()


KINDS: dict[str, Callable[[], nn.Module]] = {
    "data of an input": partial(Blocks, ChangesItsInput),
    "requires_grad": partial(Blocks, AsksOfItsInput),
    "is_grad_enabled": partial(Blocks, AsksTheMode),
    "an array": partial(Giving, partial(np.zeros, 1)),
    "an iterator": partial(Giving, lambda: iter([1.0, 2.0, 3.0, 4.0])),
    "an iterator that goes on": partial(Giving, partial(count, 1)),
    "a function that yields": partial(Giving, lambda: (float(number) for number in range(1, 5))),
    "a generator": partial(Giving, lambda: torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused_or_exact(kind: str, mode: Mode, tmp_path: Path) -> None:
    if mode.keep:
        assert_exact(KINDS[kind], mode, tmp_path)
        return
    with pytest.raises(ModelError, match="computes something else when it runs again in backward"):
        assert_exact(KINDS[kind], mode, tmp_path)


class Masked(Block):
    def forward(self, x: torch.Tensor, mask: Any = None) -> Any:
        return x + torch.tanh(self.linear(x * mask.clone()))


class ChangesItsMask(Blocks):
    """In place, and only after a step whose recomputes were compared."""

    def __init__(self, change: Callable[[torch.Tensor], object]) -> None:
        super().__init__(Masked)
        self.change = change
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        mask = torch.ones_like(x)
        for layer in self.layers:
            x = layer(x, mask)
            if self.calls > 4:
                self.change(mask)
        return x.square().mean()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_argument_without_gradient_that_changes_later(mode: Mode, tmp_path: Path) -> None:
    make = partial(ChangesItsMask, lambda mask: mask.mul_(0.5))
    if mode.keep:
        assert_exact(make, mode, tmp_path)
        return
    with pytest.raises(ModelError, match=r"argument of layers\.\d was changed in place"):
        assert_exact(make, mode, tmp_path)


class ChangesItsBuffer(ChangesItsMask):
    """Which is put back for each recompute, so the count of its changes says nothing."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__(lambda mask: None)
        self.register_buffer("mask", torch.ones(3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, self.mask)
            self.mask.mul_(0.9)
        return x.square().mean()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_buffer_among_the_arguments_may_change(mode: Mode, tmp_path: Path) -> None:
    assert_exact(ChangesItsBuffer, mode, tmp_path)


def test_last_places_and_single_tokens_are_no_difference() -> None:
    result = torch.linspace(-3, 3, 1000)
    moved = result * (1 + 1e-4)
    moved[:20] = 7.0
    compare("layers.0", some_of([result]), some_of([moved]))
    compare("layers.0", some_of([torch.full((4,), torch.nan)]), some_of([torch.full((4,), torch.nan)]))
    compare("layers.0", some_of([torch.zeros(0)]), some_of([torch.zeros(0)]))
    with pytest.raises(ModelError, match=r"^layers\.0 computes something else"):
        compare("layers.0", some_of([result]), some_of([result + 1]))
    with pytest.raises(ModelError, match="something else"):
        compare("layers.0", some_of([result]), some_of([result, result]))
