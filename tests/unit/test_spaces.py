"""State that a model's code reaches only through names: helpers, their globals, hooks, objects, modules of Python."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import counting
from blocks import WIDTH, Block, Blocks, Mode, assert_exact, make_batch, on_meta, open_blocks
from checkpoints import save
from zinf_cli.engine.compute.sweep_member import MicroBatch
from zinf_cli.engine.engine import Engine
from zinf_cli.engine.traffic.adamw import AdamW
from zinf_cli.models.checkpoint_reader import CheckpointReader, load_buffers_of

COUNT = 0
SEEN: list[int] = []
CALLS = ContextVar("calls", default=0)
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


def count_in_context() -> int:
    CALLS.set(CALLS.get() + 1)
    return CALLS.get()


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
    "a context variable": lambda: count_in_context(),
    "a generator": lambda: int(DRAWN.integers(9)),
}


class CountsBy(Block):
    way: Callable[[], int]

    def forward(self, x: torch.Tensor) -> Any:
        return x + torch.tanh(self.linear(x)) * (1 + 0.1 * (self.way() % 3))


class CountsInHook(Block):
    def begin(self) -> None:
        self.linear.register_forward_hook(lambda module, args, out: out * (1 + 0.1 * (count_in_a_number() % 3)))


class Keeping(Block):
    """Attributes of many kinds."""

    def begin(self) -> None:
        self.mean: torch.Tensor | None = None
        self.seen: dict[int, Any] = {}
        self.drawn = np.random.default_rng(self.number)
        self.register_buffer("longest", None)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.linear(x)
        old = hidden.new_zeros(WIDTH) if self.mean is None else self.mean
        self.mean = 0.9 * old + 0.1 * hidden.detach().mean(0)
        calls, last = self.seen.get(self.number, (0, [np.zeros(2)]))
        self.seen[self.number] = (calls + 1, [last[0] + self.drawn.random(2)])
        self.longest = old[: calls % WIDTH]
        return x + torch.tanh(hidden * (1 + old)) * (1 + float(last[0].sum()) % 1) + self.longest.sum()


class Opening(Block):
    """An attribute that no file can hold."""

    def begin(self) -> None:
        self.opened: list[Any] = []

    def forward(self, x: torch.Tensor) -> Any:
        self.opened.append(iter([len(self.opened)]))
        return super().forward(x)


def _counting(way: str) -> Callable[[], Blocks]:
    kind = CountsInHook if way == "a hook" else type("CountsBy", (CountsBy,), {"way": staticmethod(WAYS[way])})

    def make() -> Blocks:
        global COUNT, count_by_decorator
        COUNT = counting.CALLS[0] = TRACKER.calls = count_in_default.__defaults__[0][0] = 0  # type: ignore[index]
        SEEN.clear()
        CALLS.set(0)
        Tracker.made.clear()
        SHELF.calls.zero_()
        DRAWN.bit_generator.state = np.random.default_rng(1).bit_generator.state
        count_in_attribute.__dict__.clear()
        count_by_decorator = counted(count_by_decorator.__wrapped__)  # type: ignore[attr-defined]
        return Blocks(kind)

    return make


IN_MEMORY = [Mode(keep=keep, per_sweep=per_sweep) for keep in (False, True) for per_sweep in (1, None)]


def steps(opened: Engine, numbers: range) -> list[float]:
    """The losses of steps of two micro-batches."""
    losses = []
    for step in numbers:
        batches = [partial(opened.model, make_batch(step, number)) for number in range(2)]
        work = [MicroBatch(batch, 0.5, 10 * step + number) for number, batch in enumerate(batches)]
        losses += opened.train_step(work, AdamW(1e-3), more=step < numbers[-1]).losses
    return losses


@pytest.mark.sampled
@pytest.mark.parametrize("way", [*WAYS, "a hook", "attributes"])
def test_a_run_that_goes_on_from_a_checkpoint_has_it_too(way: str, tmp_path: Path) -> None:
    make = partial(Blocks, Keeping) if way == "attributes" else _counting(way)
    unbroken = open_blocks(on_meta(make()), Mode(), tmp_path)
    expected = steps(unbroken, range(4))
    unbroken.close()
    stopped = open_blocks(on_meta(make()), Mode(), tmp_path)
    assert steps(stopped, range(2)) == expected[:4]
    folder = save(stopped, tmp_path, 2)
    stopped.close()
    said: list[str] = []
    goes_on = open_blocks(on_meta(make()), Mode(), tmp_path, notice=said.append)
    reader = CheckpointReader(folder)
    goes_on.load_state(reader)
    reader.close()
    goes_on.restore_places(load_buffers_of(folder, goes_on.model))
    assert steps(goes_on, range(2, 4)) == expected[4:]
    assert not [line for line in said if "may differ" in line]
    goes_on.close()


def test_what_no_checkpoint_can_hold_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    opened = open_blocks(on_meta(Blocks(Opening)), Mode(), tmp_path, notice=said.append)
    steps(opened, range(2))
    folder = save(opened, tmp_path, 2)
    opened.close()
    lost = "layers.0.opened, which the model's forward changes, is in no checkpoint: a run that goes on may differ"
    assert lost in said
    goes_on = open_blocks(on_meta(Blocks(Opening)), Mode(), tmp_path, notice=said.append)
    goes_on.restore_places(load_buffers_of(folder, goes_on.model))
    assert lost.replace("is in no checkpoint", "is not what it was at the checkpoint") in said
    goes_on.close()


@pytest.mark.sampled
@pytest.mark.parametrize("mode", IN_MEMORY, ids=str)
@pytest.mark.parametrize("way", [*WAYS, "a hook"])
def test_state_that_only_helpers_name_is_what_plain_pytorch_has(way: str, mode: Mode, tmp_path: Path) -> None:
    assert_exact(_counting(way), mode, tmp_path)
