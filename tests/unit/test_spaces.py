"""State that a model's code reaches only through names: helpers, their globals, hooks, objects, modules of Python."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import counting
from blocks import Block, Blocks, Mode, assert_exact

COUNT = 0
SEEN: list[int] = []
DRAWN = np.random.default_rng(1)


def count_in_a_number() -> int:
    global COUNT
    COUNT += 1
    return COUNT


def count_in_a_list() -> int:
    SEEN.append(len(SEEN))
    return len(SEEN)


class Tracker:
    made: list[int] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls

    @property
    def in_class(self) -> int:
        self.made.append(1)
        return len(self.made)


class Shelf(nn.Module):
    """No module of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.calls: torch.Tensor

    def forward(self) -> int:
        self.calls += 1
        return int(self.calls)


def counted(function: Callable[[], int]) -> Callable[[], int]:
    calls = 0

    @wraps(function)
    def wrapper() -> int:
        nonlocal calls
        calls += 1
        return calls + function()

    return wrapper


@counted
def count_by_decorator() -> int:
    return count_in_a_number()


def count_in_default(calls: list[int] = [0]) -> int:  # noqa: B006
    calls[0] += 1
    return calls[0]


def count_in_attribute() -> int:
    count_in_attribute.calls = getattr(count_in_attribute, "calls", 0) + 1  # type: ignore[attr-defined]
    return count_in_attribute.calls  # type: ignore[attr-defined, no-any-return]


def count_by_import() -> int:
    from counting import bump

    return bump()


TRACKER, SHELF = Tracker(), Shelf()
TABLE = {"count": [count_in_a_number]}
WAYS: dict[str, Callable[[], int]] = {
    "a helper's global number": lambda: count_in_a_number(),
    "a helper's global list": lambda: count_in_a_list(),
    "a helper of another module": lambda: counting.bump(),
    "a helper that is imported when it is called": lambda: count_by_import(),
    "a function in a dict": lambda: TABLE["count"][0](),
    "a decorator": lambda: count_by_decorator(),
    "an object": lambda: TRACKER(),
    "a property, in the class": lambda: TRACKER.in_class,
    "a default": lambda: count_in_default(),
    "an attribute of a function": lambda: count_in_attribute(),
    "a partial": partial(count_in_default),
    "a function made in the call": lambda: (lambda: [count_in_a_list() for _ in range(2)][1])(),
    "a module beside the model": lambda: SHELF(),
    "a generator": lambda: int(DRAWN.integers(9)),
}


class CountsBy(Block):
    way: Callable[[], int]

    def forward(self, x: torch.Tensor) -> Any:
        return x + torch.tanh(self.linear(x)) * (1 + 0.1 * (self.way() % 3))


class CountsInHook(Block):
    def begin(self) -> None:
        self.linear.register_forward_hook(lambda module, args, out: out * (1 + 0.1 * (count_in_a_number() % 3)))


def _counting(way: str) -> Callable[[], Blocks]:
    kind = CountsInHook if way == "a hook" else type("CountsBy", (CountsBy,), {"way": staticmethod(WAYS[way])})

    def make() -> Blocks:
        global COUNT, count_by_decorator
        COUNT = counting.CALLS[0] = TRACKER.calls = count_in_default.__defaults__[0][0] = 0  # type: ignore[index]
        SEEN.clear()
        Tracker.made.clear()
        SHELF.calls.zero_()
        DRAWN.bit_generator.state = np.random.default_rng(1).bit_generator.state
        count_in_attribute.__dict__.clear()
        count_by_decorator = counted(count_by_decorator.__wrapped__)  # type: ignore[attr-defined]
        return Blocks(kind)

    return make


IN_MEMORY = [Mode(keep=keep, per_sweep=per_sweep) for keep in (False, True) for per_sweep in (1, None)]


@pytest.mark.parametrize("mode", IN_MEMORY, ids=str)
@pytest.mark.parametrize("way", [*WAYS, "a hook"])
def test_state_that_only_helpers_name_is_what_plain_pytorch_has(way: str, mode: Mode, tmp_path: Path) -> None:
    assert_exact(_counting(way), mode, tmp_path)
